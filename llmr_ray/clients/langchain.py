"""A LangChain retriever over a served collection (`pip install llmr_ray[clients]`)."""

from collections.abc import Mapping
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from llmr_ray.clients.exchange import Patience
from llmr_ray.clients.http import AsyncClient, Client
from llmr_ray.clients.results import Retrieval


class LlmrRetriever(BaseRetriever):
    """Documents of a server: `LlmrRetriever(url="http://127.0.0.1:8000", k=5).invoke("a question")`.

    A document's metadata are those of the collection, with `score` (the retrieval score) and, where there is one,
    `title`; its id is the collection's. Any setting but url, api_key and timeout_s may be given to `invoke` too.
    Errors are those of llmr_ray.clients.Client.
    """

    model_config = ConfigDict(extra="forbid")

    url: str
    """Of the server."""
    api_key: SecretStr | None = None
    """None: what LLMR_API_KEY holds."""
    task: str | None = None
    """Whose instruction stands before the query; None: the server's default."""
    k: int = Field(default=10, ge=1)
    """Documents for a query."""
    filter: dict[str, Any] | None = None
    """Which documents count, in OpenAI's or Qdrant's form."""
    min_score: float | None = None
    """Least retrieval score."""
    timeout_s: float = Patience.timeout_s
    """Of one attempt."""

    _client: Client = PrivateAttr()
    _async_client: AsyncClient = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Makes the clients; no connection is opened before the first query."""
        key = self.api_key.get_secret_value() if self.api_key else None
        self._client = Client(self.url, key, timeout_s=self.timeout_s)
        self._async_client = AsyncClient(self.url, key, timeout_s=self.timeout_s)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **changes: Any
    ) -> list[Document]:
        return _documents(self._client.retrieve(query, **self._how(changes)))

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **changes: Any
    ) -> list[Document]:
        return _documents(await self._async_client.retrieve(query, **self._how(changes)))

    def _how(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        how = {"task": self.task, "k": self.k, "filter": self.filter, "min_score": self.min_score}
        unknown = sorted(set(changes) - set(how))
        if unknown:
            raise TypeError(f"invoke() takes {sorted(how)} here, not {unknown}.")
        how |= changes
        return {"top_k": how.pop("k")} | how


def _documents(found: Retrieval) -> list[Document]:
    return [
        Document(
            id=hit.doc_id,
            page_content=hit.text or "",
            metadata={**(hit.metadata or {}), **({"title": hit.title} if hit.title else {}), "score": score},
        )
        for hit in found.hits
        for score in (hit.retrieval_score,)
    ]
