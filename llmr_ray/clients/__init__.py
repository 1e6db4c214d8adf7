"""Clients of a served collection: plain Python, LangChain, LlamaIndex. Importing them loads neither torch nor Ray."""

from llmr_ray.clients.errors import RequestRefusedError, ServerUnavailableError
from llmr_ray.clients.http import AsyncClient, Client
from llmr_ray.clients.results import RankedDocument, Retrieval, ServerInfo
from llmr_ray.serving.protocol import Hit

__all__ = [
    "AsyncClient",
    "Client",
    "Hit",
    "RankedDocument",
    "RequestRefusedError",
    "Retrieval",
    "ServerInfo",
    "ServerUnavailableError",
]
