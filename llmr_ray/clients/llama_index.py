"""A LlamaIndex retriever over a served collection (`pip install llmr_ray[clients]`)."""

from collections.abc import Mapping
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llmr_ray.clients.http import AsyncClient, Client
from llmr_ray.clients.results import Retrieval


class LlmrRetriever(BaseRetriever):
    """Nodes of a server: `LlmrRetriever("http://127.0.0.1:8000", top_k=5).retrieve("a question")`.

    A node's metadata are those of the collection and, where there is one, `title`; its id is the collection's. Of nodes
    with the same text and metadata LlamaIndex keeps the best.

    Args:
        url: of the server.
        api_key: None: what LLMR_API_KEY holds.
        task: whose instruction stands before the query; None: the server's default.
        top_k: nodes for a query.
        filter: which documents count, in OpenAI's or Qdrant's form.
        min_score: least retrieval score.
        client_settings: of llmr_ray.clients.Client, for example {"timeout_s": 5}.
        settings: of LlamaIndex' BaseRetriever.

    Errors are those of llmr_ray.clients.Client.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        task: str | None = None,
        top_k: int = 10,
        filter: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        client_settings: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._client = Client(url, api_key, **(client_settings or {}))
        self._async_client = AsyncClient(url, api_key, **(client_settings or {}))
        self._how = {"task": task, "top_k": top_k, "filter": filter, "min_score": min_score}
        super().__init__(**settings)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _nodes(self._client.retrieve(query_bundle.query_str, **self._how))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return _nodes(await self._async_client.retrieve(query_bundle.query_str, **self._how))


def _nodes(found: Retrieval) -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                id_=hit.doc_id,
                text=hit.text or "",
                metadata={**(hit.metadata or {}), **({"title": hit.title} if hit.title else {})},
            ),
            score=hit.retrieval_score,
        )
        for hit in found.hits
    ]
