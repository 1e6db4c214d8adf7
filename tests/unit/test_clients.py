"""The Python client, and the retrievers of LangChain and LlamaIndex, against a live server and against bad ones."""

import asyncio
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from langchain_tests.integration_tests import RetrieversIntegrationTests

from llmr_ray.clients import AsyncClient, Client, RequestRefusedError, ServerUnavailableError, llama_index
from llmr_ray.clients.http import RESULTS
from llmr_ray.clients.langchain import LlmrRetriever
from llmr_ray.errors import ConfigError
from llmr_ray.modeling.cross_encoder import CrossEncoder
from llmr_ray.serving.keys import add_key
from tests.live_server import Server
from tests.serving_world import World, documents, world
from tests.tiny import tiny_bert


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def server(docs: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("reranker")
    CrossEncoder(tiny_bert(folder / "base"), max_tokens=24).save(folder / "made")
    settings = docs.settings(reranker=str(folder / "made"), reranker_max_tokens=24, max_texts=3, default_task="qa")
    running = Server(docs.service(settings))
    yield running
    running.close()


@pytest.fixture(scope="module")
def locked(docs: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server that wants a key, and a key."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    key = add_key(file, "app", ("read",))
    running = Server(docs.service(docs.settings(keys_file=str(file), num_canaries=0)))
    yield running, key
    running.close()


def ask(kind: type, url: str, method: str, *given: Any, settings: dict[str, Any] | None = None, **how: Any) -> Any:
    """One call by the blocking or the asyncio client."""
    if kind is Client:
        with Client(url, **(settings or {})) as client:
            return getattr(client, method)(*given, **how)

    async def asked() -> Any:
        async with AsyncClient(url, **(settings or {})) as client:
            return await getattr(client, method)(*given, **how)

    return asyncio.run(asked())


both = pytest.mark.parametrize("kind", [Client, AsyncClient])


def test_importing_a_client_is_light() -> None:
    """A service that only asks a server should neither wait for torch or Ray nor need the frameworks' packages."""
    code = (
        "import sys, llmr_ray.clients; heavy = ('torch', 'ray', 'vllm', 'transformers', 'numpy', 'pyarrow', 'faiss', "
        "'langchain_core', 'llama_index', 'starlette'); sys.exit(int(any(name in sys.modules for name in heavy)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- against a live server -------------------------------------------------------------------------------------------


@both
def test_typed_results_are_what_the_server_says(server: Server, docs: World, kind: type) -> None:
    """A client that loses, reorders or renames anything is worse than plain HTTP."""
    queries = ["a b", "c d e", "j", "f g", "a a b"]
    chosen = {"type": "eq", "key": "lang", "value": "en"}
    found = ask(kind, server.url, "retrieve_many", queries, task="chat", top_k=4, filter=chosen, settings={"batch": 2})
    assert [one.query for one in found] == queries
    for one in found:
        body = {"query": one.query, "task": "chat", "top_k": 4, "filter": chosen}
        raw = server.post("/v1/retrieve", body).json()
        assert [hit.to_dict() | {"score": 0} for hit in one.hits] == [hit | {"score": 0} for hit in raw["results"][0]]
        np.testing.assert_allclose(
            [hit.retrieval_score for hit in one.hits], [hit["score"] for hit in raw["results"][0]], atol=1e-6
        )
        assert (one.index_snapshot, one.partial) == (docs.current, False)
        assert len(one.request_id) == 16
    single = ask(kind, server.url, "retrieve", "c d e", task="chat", top_k=4, filter=chosen)
    assert [hit.doc_id for hit in single.hits] == [hit.doc_id for hit in found[1].hits]
    bare = ask(kind, server.url, "retrieve", "c d e", min_score=2.0, with_text=False)
    assert bare.hits == []


@both
def test_deep_retrievals_are_cut_to_the_servers_limit(locked: tuple[Server, str], kind: type) -> None:
    """A batch that the server refuses as too long an answer would be the client's fault, not its user's."""
    server, key = locked
    queries, settings = ["a b", "c", "d e", "f", "g"], {"api_key": key}
    for with_text, num_requests in ((True, 2), (False, 1)):
        how = {"task": "qa", "top_k": 1000, "with_text": with_text}
        found = ask(kind, server.url, "retrieve_many", queries, settings=settings, **how)
        assert [(one.query, len(one.hits)) for one in found] == [(query, 60) for query in queries]
        assert len({one.request_id for one in found}) == num_requests
        assert all((hit.text is not None) == with_text and hit.metadata for one in found for hit in one.hits)
    assert ask(kind, server.url, "info", settings=settings).limits["max_results"] == RESULTS


@both
def test_embeddings_rankings_and_information(server: Server, docs: World, kind: type) -> None:
    """Vectors travel as base64; a wrong byte order or batch order would still look like vectors."""
    texts = ["a b", "c", "d e f", "j"]
    vectors = ask(kind, server.url, "embed", texts, task="qa", side="document", settings={"batch": 3})
    raw = server.post("/v1/embeddings", {"input": texts[1:], "model": "docs/qa-document"}).json()
    np.testing.assert_allclose(vectors[1:], [row["embedding"] for row in raw["data"]], atol=1e-6)
    ranked = ask(kind, server.url, "rerank", "a b", texts, top_n=3)
    raw = server.post("/v1/rerank", {"query": "a b", "documents": texts, "top_n": 3}).json()
    assert [dataclasses.asdict(row) for row in ranked] == raw["results"]
    told = ask(kind, server.url, "info")
    assert (told.collection, told.num_documents, told.limits["max_texts"]) == ("docs", 60, 3)
    assert (list(told.tasks), told.default_task, told.dimension) == (["chat", "qa"], "qa", 16)


@both
def test_a_refusal_says_what_and_what_to_do(server: Server, kind: type) -> None:
    """`422 Unprocessable` alone sends people to the server's source code."""
    with pytest.raises(RequestRefusedError, match=r"`task` must be one of: chat, qa.*request") as refused:
        ask(kind, server.url, "retrieve", "zanzibar", task="zanzibar")
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, "unknown_task", "task")
    assert "zanzibar" not in str(refused.value)
    with pytest.raises(RequestRefusedError, match="3 at the most"):
        ask(kind, server.url, "retrieve_many", ["a"] * 5)
    with pytest.raises(RequestRefusedError, match="surrogate"):
        ask(kind, server.url, "retrieve", "a \ud800")
    with pytest.raises(TypeError, match="one text"):
        ask(kind, server.url, "retrieve_many", "a b")


@both
def test_a_key_is_sent_and_a_missing_one_is_explained(
    locked: tuple[Server, str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commonest first error of a new user; and the key itself must stay out of every message."""
    server, key = locked
    monkeypatch.delenv("LLMR_API_KEY", raising=False)
    with pytest.raises(RequestRefusedError, match="LLMR_API_KEY") as refused:
        ask(kind, server.url, "retrieve", "a", task="qa")
    assert refused.value.status == 401
    assert ask(kind, server.url, "retrieve", "a", task="qa", settings={"api_key": key}).hits
    monkeypatch.setenv("LLMR_API_KEY", key)
    assert ask(kind, server.url, "retrieve", "a", task="qa").hits
    assert key not in repr(kind(server.url))
    with pytest.raises(ConfigError) as wrong:
        kind(server.url, api_key=f"{key}\nx: y")
    assert key not in str(wrong.value)


def test_an_asyncio_client_outlives_its_event_loop(server: Server) -> None:
    """Retrievers are asked from one asyncio.run after another; connections of an ended loop answer nobody."""
    client = AsyncClient(server.url)
    for _ in range(3):
        assert len(asyncio.run(client.retrieve("a b", top_k=3)).hits) == 3

    async def together() -> list[Any]:
        return await asyncio.gather(*(client.retrieve(text, top_k=1) for text in "abcdefghij"))

    assert [one.query for one in asyncio.run(together())] == list("abcdefghij")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://me:secret@host", ""])
def test_a_wrong_address_is_said_at_once(url: str) -> None:
    """Not after two minutes of retries."""
    with pytest.raises(ConfigError) as wrong:
        Client(url)
    assert "secret" not in str(wrong.value)


# --- against bad servers ---------------------------------------------------------------------------------------------

FINE = {"results": [[{"id": "d", "score": 0.5}]], "index_snapshot": "s", "partial": False, "request_id": "r"}


class Scripted:
    """A real server that answers what it was told to, in order, and notes when and what it was asked."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | float) -> None:
        self.asked: list[float] = []
        self.headers: list[dict[str, str]] = []
        waiting = list(answers)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append(time.monotonic())
                outer.headers.append(dict(self.headers))
                answer = waiting.pop(0) if waiting else (200, {}, json.dumps(FINE).encode())
                if isinstance(answer, float):
                    time.sleep(answer)
                    self.close_connection = True
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def busy(status: int, retry_after: str | None = None) -> tuple[int, dict[str, str], bytes]:
    body = {"error": {"message": "too many requests.", "code": "busy", "param": None, "request_id": "r1"}}
    return status, {"retry-after": retry_after} if retry_after else {}, json.dumps(body).encode()


@both
def test_a_busy_server_is_asked_again_when_it_said(kind: type) -> None:
    """Asking at once keeps a busy server busy; giving up fails what would have worked a second later."""
    with Scripted(busy(429, "1"), busy(503)) as server:
        assert ask(kind, server.url, "retrieve", "a").hits[0].doc_id == "d"
    first, second, third = server.asked
    assert second - first >= 1.0
    assert 0.2 <= third - second < 1.0
    ids = [headers["x-request-id"] for headers in server.headers]
    assert len(set(ids)) == 1, "all attempts of a request are one request in the log"


def test_a_date_to_retry_after_is_understood() -> None:
    """RFC 9110 allows both forms, and proxies send dates."""
    at = int(time.time()) + 3  # a date has whole seconds
    with Scripted(busy(503, formatdate(at, usegmt=True))) as server:
        assert ask(Client, server.url, "retrieve", "a").hits
    assert time.time() >= at


@both
def test_patience_ends(kind: type) -> None:
    """A wait that is longer than the caller has must fail at once, and say how long it would be."""
    with Scripted(busy(503, "900")) as server, pytest.raises(ServerUnavailableError, match="too many") as error:
        ask(kind, server.url, "retrieve", "a", settings={"total_s": 5})
    assert len(server.asked) == 1
    assert (error.value.status, error.value.retry_after, error.value.request_id) == (503, 900, "r1")
    with Scripted(*[busy(503)] * 9) as server, pytest.raises(ServerUnavailableError):
        ask(kind, server.url, "retrieve", "a", settings={"max_retries": 1})
    assert len(server.asked) == 2


@both
@pytest.mark.parametrize("status", [400, 422, 500, 504])
def test_what_would_fail_again_is_sent_once(kind: type, status: int) -> None:
    """A request that was given up for its time (504) was worked on already; repeating it doubles the load."""
    with (
        Scripted(busy(status, "1")) as server,
        pytest.raises(RequestRefusedError if status < 500 else ServerUnavailableError),
    ):
        ask(kind, server.url, "retrieve", "a")
    assert len(server.asked) == 1


@both
def test_a_slow_answer_is_given_up_and_not_repeated(kind: type) -> None:
    """Without an end, one stuck server holds every worker of its clients."""
    started = time.monotonic()
    with Scripted(2.0) as server, pytest.raises(ServerUnavailableError, match="timeout_s"):
        ask(kind, server.url, "retrieve", "a", settings={"timeout_s": 0.3})
    assert time.monotonic() - started < 2
    assert len(server.asked) == 1


@both
def test_a_connection_that_breaks_is_made_again(kind: type) -> None:
    """A replica that is replaced closes its connections; asking changes nothing, so it is asked again."""
    with Scripted(0.0) as server:
        assert ask(kind, server.url, "retrieve", "a").hits
    assert len(server.asked) == 2


@both
def test_a_proxy_that_has_just_started_is_asked_again(kind: type) -> None:
    """Ray Serve's answers 404 until it has heard of the application; as a refusal that would end a client's work."""
    path = b"Path '/v1/retrieve' not found. Ping http://.../-/routes for available routes."
    with Scripted((404, {}, path), (404, {}, path)) as server:
        assert ask(kind, server.url, "retrieve", "a").hits
    assert len(server.asked) == 3
    with Scripted(*[(404, {}, path)] * 9) as server, pytest.raises(ServerUnavailableError, match="no application"):
        ask(kind, server.url, "retrieve", "a", settings={"max_retries": 1})


@both
def test_no_server_is_told_with_the_command_that_starts_one(kind: type) -> None:
    """`[Errno 111]` helps nobody."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ServerUnavailableError, match="llmr serve"):
        ask(kind, url, "retrieve", "a", settings={"max_retries": 1})


@both
@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>welcome</html>"),
        (200, {}, b'{"results": [[]]}'),
        (200, {}, b'{"results": [[], []], "index_snapshot": "s", "partial": false, "request_id": "r"}'),
        (200, {}, b'{"results": [[{"id": "d"}]], "index_snapshot": "s", "partial": false, "request_id": "r"}'),
        (302, {"location": "http://127.0.0.1:1/login"}, b""),
        (404, {}, b"nothing here"),
        (405, {}, b'{"error": "no"}'),
        (500, {}, b"[" * 100_000),
    ],
)
def test_another_server_behind_the_address_is_no_result(kind: type, answer: Any) -> None:
    """A proxy's welcome page must not become an empty list of documents."""
    with Scripted(answer) as server, pytest.raises((ServerUnavailableError, RequestRefusedError)) as error:
        ask(kind, server.url, "retrieve", "a")
    assert server.url in str(error.value)
    assert len(server.asked) == 1


# --- frameworks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(server: Server) -> list[dict[str, Any]]:
    raw = server.post("/v1/retrieve", {"query": "a b f", "task": "qa", "top_k": 5}).json()
    return raw["results"][0]


def test_langchain_documents_are_the_servers(server: Server, expected: list[dict[str, Any]]) -> None:
    """Ids are what a chain cites, and the score what it cuts by."""
    retriever = LlmrRetriever(url=server.url, k=5, api_key="not-needed")
    for found in (retriever.invoke("a b f", task="qa"), asyncio.run(retriever.ainvoke("a b f"))):
        assert [(one.id, one.page_content) for one in found] == [(hit["id"], hit["text"]) for hit in expected]
        scores = [one.metadata.pop("score") for one in found]
        np.testing.assert_allclose(scores, [hit["score"] for hit in expected], atol=1e-6)
        assert [one.metadata.pop("title", None) for one in found] == [hit.get("title") for hit in expected]
        assert [one.metadata for one in found] == [hit["metadata"] for hit in expected]
    chosen = {"type": "eq", "key": "lang", "value": "en"}
    assert {one.metadata["lang"] for one in retriever.invoke("a b f", filter=chosen)} == {"en"}
    assert "not-needed" not in repr(retriever)
    with pytest.raises(TypeError, match="top_k"):
        retriever.invoke("a", top_k=3)
    with pytest.raises(ValueError, match="top_k"):
        LlmrRetriever(url=server.url, top_k=3)


def test_llama_index_nodes_are_the_servers(server: Server, expected: list[dict[str, Any]]) -> None:
    """As for LangChain."""
    retriever = llama_index.LlmrRetriever(server.url, task="qa", top_k=5)
    for found in (retriever.retrieve("a b f"), asyncio.run(retriever.aretrieve("a b f"))):
        assert [one.node.node_id for one in found] == [hit["id"] for hit in expected]
        assert [one.node.get_content() for one in found] == [hit["text"] for hit in expected]
        np.testing.assert_allclose([one.score for one in found], [hit["score"] for hit in expected], atol=1e-6)
        assert [one.node.metadata.get("year") for one in found] == [hit["metadata"]["year"] for hit in expected]


def test_examples_of_documents_are_those_of_the_collection(server: Server) -> None:
    """The whole collection can be had, so a framework's results are compared with it and not with themselves."""
    rows = {row["doc_id"]: row["text"] for row in documents(60)}
    found = ask(Client, server.url, "retrieve", "a b", top_k=60)
    assert {hit.doc_id: hit.text for hit in found.hits} == rows


class TestLangChainStandard(RetrieversIntegrationTests):
    """LangChain's own tests of what any retriever must do."""

    url = ""

    @pytest.fixture(autouse=True)
    def _at(self, server: Server) -> None:
        type(self).url = server.url

    @property
    def retriever_constructor(self) -> type[LlmrRetriever]:
        return LlmrRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"url": self.url, "task": "qa"}

    @property
    def retriever_query_example(self) -> str:
        return "a b f"
