"""The Python client of a server, blocking and not.

with Client("http://127.0.0.1:8000") as client:
    for hit in client.retrieve("who wrote Dune?", top_k=5).hits:
        print(hit.retrieval_score, hit.title, hit.text)
"""

import asyncio
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx

from llmr_ray.clients import results
from llmr_ray.clients.exchange import Exchange, Failure, Patience, Pause, Reply, Send, exchange, not_ours
from llmr_ray.clients.results import RankedDocument, Retrieval, ServerInfo
from llmr_ray.errors import ConfigError

KEY_VARIABLE = "LLMR_API_KEY"
"""The environment variable of the API key, where none is given."""

BATCH = 64
"""Texts of a request; a server's default limit (max_texts). Longer lists go in several requests, one after another."""

RESULTS = 3200
"""Queries of a request times top_k, with texts; a server's default limit (max_results). Requests are cut to it too."""

Side = Literal["query", "document"]
T = TypeVar("T")


class _Connection:
    """What both clients have in common."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = Patience.timeout_s,
        total_s: float = Patience.total_s,
        max_retries: int = Patience.max_retries,
        batch: int = BATCH,
    ) -> None:
        self.url = _checked(url)
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError("the API key holds blanks, line ends or letters that no key has. Was it copied whole?")
        if timeout_s <= 0 or total_s <= 0 or max_retries < 0 or batch < 1:
            raise ConfigError("timeout_s, total_s and batch must be above 0, and max_retries not below 0.")
        self._patience = Patience(timeout_s=timeout_s, total_s=total_s, max_retries=max_retries)
        self._batch = batch
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _post(self, path: str, body: Mapping[str, Any]) -> Exchange[dict[str, Any]]:
        return exchange(self.url, "POST", path, {k: v for k, v in body.items() if v is not None}, self._patience)

    def _retrieving(
        self,
        queries: Sequence[str],
        *,
        task: str | None = None,
        top_k: int = 10,
        filter: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        with_text: bool = True,
    ) -> Exchange[list[Retrieval]]:
        how = {"task": task, "top_k": top_k, "filter": filter, "min_score": min_score, "with_text": with_text}
        found: list[Retrieval] = []
        most = max(1, RESULTS // max(1, top_k)) if with_text else self._batch
        for part in self._batches(queries, "queries", most):
            answer = yield from self._post("/v1/retrieve", {"queries": list(part)} | how)
            found += self._read(results.retrievals, answer, part)
        return found

    def _embedding(
        self, texts: Sequence[str], *, task: str | None = None, side: Side = "query", model: str | None = None
    ) -> Exchange[list[list[float]]]:
        # base64 is a third of the digits, and exact.
        how = {"model": model or (yield from self._informing()).model, "encoding_format": "base64", "task": task}
        vectors: list[list[float]] = []
        for part in self._batches(texts, "texts"):
            answer = yield from self._post("/v1/embeddings", {"input": list(part), "input_type": side} | how)
            vectors += self._read(results.embeddings, answer, len(part))
        return vectors

    def _reranking(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None
    ) -> Exchange[list[RankedDocument]]:
        answer = yield from self._post("/v1/rerank", {"query": query, "documents": list(documents), "top_n": top_n})
        return self._read(results.ranking, answer, len(documents))

    def _informing(self) -> Exchange[ServerInfo]:
        answer = yield from exchange(self.url, "GET", "/info", None, self._patience)
        return self._read(results.server_info, answer)

    def _batches(self, texts: Sequence[str], name: str, most: int = sys.maxsize) -> list[Sequence[str]]:
        if isinstance(texts, str):
            raise TypeError(f"`{name}` is one text; give a list of texts.")
        size = min(self._batch, most)
        return [texts[start : start + size] for start in range(0, len(texts), size)]

    def _read(self, read: Callable[..., T], answer: Mapping[str, Any], *more: Any) -> T:
        """The answer in its typed form."""
        try:
            return read(answer, *more)
        except (KeyError, TypeError, ValueError) as error:
            raise not_ours(self.url, str(answer.get("request_id", ""))) from error


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address of a server ({error}). Example: http://127.0.0.1:8000.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r} is no address of a server. Example: http://127.0.0.1:8000.")
    if parsed.userinfo:
        raise ConfigError("the address holds a password. Give the API key as api_key, or in LLMR_API_KEY.")
    return url.rstrip("/")


class Client(_Connection):
    """Asks a server; for use by several threads too. Close it, or use it in a `with` block.

    Args:
        url: of the server, for example http://127.0.0.1:8000.
        api_key: where the server asks for one; None: what LLMR_API_KEY holds.
        timeout_s: of one attempt.
        total_s: of a request with all its attempts and pauses.
        max_retries: attempts after the first, where the server is busy (429, 502, 503: after as long as it says) or
            cannot be reached.
        batch: texts of one request at the most.

    All methods raise RequestRefusedError and ServerUnavailableError; the constructor raises ConfigError.
    """

    def __init__(self, url: str, api_key: str | None = None, **settings: Any) -> None:
        super().__init__(url, api_key, **settings)
        self._http = httpx.Client(headers=self._headers)

    def retrieve(self, query: str, **how: Any) -> Retrieval:
        """The documents for one query; arguments as of `retrieve_many`."""
        [found] = self.retrieve_many([query], **how)
        return found

    def retrieve_many(
        self,
        queries: Sequence[str],
        *,
        task: str | None = None,
        top_k: int = 10,
        filter: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        with_text: bool = True,
    ) -> list[Retrieval]:
        """The documents for each of several queries, in their order.

        Args:
            queries: texts.
            task: whose instruction stands before the queries; None: the server's default.
            top_k: documents for each.
            filter: which documents count, in OpenAI's or Qdrant's form.
            min_score: least retrieval score.
            with_text: fetch the texts too; ids, titles and metadata always come.
        """
        asked = self._retrieving(
            queries, task=task, top_k=top_k, filter=filter, min_score=min_score, with_text=with_text
        )
        return self._run(asked)

    def embed(
        self, texts: Sequence[str], *, task: str | None = None, side: Side = "query", model: str | None = None
    ) -> list[list[float]]:
        """The embedding of each text: lists of as many floats as the index's dimension.

        Args:
            texts: texts.
            task: whose instruction stands before them; None: the server's default.
            side: whether they are queries or documents.
            model: its name; None: it is asked for first (/info).
        """
        return self._run(self._embedding(texts, task=task, side=side, model=model))

    def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[RankedDocument]:
        """Documents by the server's cross-encoder, best first."""
        return self._run(self._reranking(query, documents, top_n=top_n))

    def info(self) -> ServerInfo:
        """What is served, and the limits of a request."""
        return self._run(self._informing())

    def _run(self, steps: Exchange[T]) -> T:
        came: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as end:
                done: T = end.value
                return done
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                came = None
            else:
                came = self._send(step)

    def _send(self, step: Send) -> Reply | Failure:
        deadline = time.monotonic() + step.seconds
        request = self._http.build_request(
            step.method, self.url + step.path, content=step.body, headers=step.headers, timeout=step.seconds
        )
        try:
            response = self._http.send(request, stream=True)
            try:
                parts = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        return Failure(f"the answer was not whole after {step.seconds:g} s", timed_out=True)
            finally:
                response.close()
        except httpx.HTTPError as error:
            return _failure(error, step)
        return Reply(response.status_code, response.headers, b"".join(parts))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Connection):
    """The same for asyncio; arguments, results and errors as of Client. It may be used by several event loops.

    Closing closes the connections of the running loop; those of a loop that has ended went with it.
    """

    def __init__(self, url: str, api_key: str | None = None, **settings: Any) -> None:
        super().__init__(url, api_key, **settings)
        # A connection belongs to the loop that opened it.
        self._https: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    async def retrieve(self, query: str, **how: Any) -> Retrieval:
        """See Client."""
        [found] = await self.retrieve_many([query], **how)
        return found

    async def retrieve_many(self, queries: Sequence[str], **how: Any) -> list[Retrieval]:
        """See Client."""
        return await self._run(self._retrieving(queries, **how))

    async def embed(self, texts: Sequence[str], **how: Any) -> list[list[float]]:
        """See Client."""
        return await self._run(self._embedding(texts, **how))

    async def rerank(self, query: str, documents: Sequence[str], *, top_n: int | None = None) -> list[RankedDocument]:
        """See Client."""
        return await self._run(self._reranking(query, documents, top_n=top_n))

    async def info(self) -> ServerInfo:
        """See Client."""
        return await self._run(self._informing())

    async def _run(self, steps: Exchange[T]) -> T:
        came: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as end:
                done: T = end.value
                return done
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                came = None
            else:
                came = await self._send(step)

    async def _send(self, step: Send) -> Reply | Failure:
        loop = asyncio.get_running_loop()
        if loop not in self._https:
            self._https[loop] = httpx.AsyncClient(headers=self._headers)
        try:
            async with asyncio.timeout(step.seconds):
                response = await self._https[loop].request(
                    step.method, self.url + step.path, content=step.body, headers=step.headers, timeout=step.seconds
                )
        except TimeoutError:
            return Failure(f"the answer was not whole after {step.seconds:g} s", timed_out=True)
        except httpx.HTTPError as error:
            return _failure(error, step)
        return Reply(response.status_code, response.headers, response.content)

    async def close(self) -> None:
        """Closes the connections of the running loop."""
        http = self._https.pop(asyncio.get_running_loop(), None)
        if http is not None:
            await http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _failure(error: httpx.HTTPError, step: Send) -> Failure:
    # A connection that was never made has no work waiting at its other end.
    timed_out = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
    said = f"no answer within {step.seconds:g} s" if timed_out else str(error) or type(error).__name__
    return Failure(said, timed_out=timed_out)
