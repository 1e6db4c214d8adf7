"""The server's routes over real HTTP (uvicorn, the official OpenAI client), without Ray."""

import asyncio
import base64
import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pyarrow as pa
import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.clients import Client, RequestRefusedError, ServerUnavailableError
from llmr_ray.errors import DataError
from llmr_ray.evaluation import endpoint
from llmr_ray.index.snapshot import OpenSnapshot, read_manifest
from llmr_ray.index.vectors import to_matrix
from llmr_ray.modeling.cross_encoder import CrossEncoder
from llmr_ray.schemas import table_of
from llmr_ray.serving import keys as keys_module
from llmr_ray.serving.keys import add_key, revoke_key
from llmr_ray.serving.protocol import RequestError
from tests.live_server import HTTP, Server
from tests.serving_world import CONFIG, World, documents, queries, world
from tests.tiny import tiny_bert
from tests.waiting import until

SECRET = "zanzibar"


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    model = CrossEncoder(tiny_bert(folder / "base"), max_tokens=24)
    model.save(folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def server(docs: World, reranker: Path) -> Iterator[Server]:
    settings = docs.settings(reranker=str(reranker), reranker_max_tokens=24, max_body_bytes=100_000, body_timeout_s=1.0)
    running = Server(docs.service(settings))
    yield running
    running.close()


@dataclass
class Found:
    ids: list[str]
    scores: list[float]


def brute_force(docs: World, query: str, task: str, k: int, keep: Any = lambda _: True) -> Found:
    """The best documents by embedding everything anew and comparing all."""
    from llmr_ray.data.text import document_text
    from llmr_ray.modeling.embedder import Embedder

    embedder = Embedder(docs.model, max_query_tokens=12, max_document_tokens=16, precision="float32")
    rows = [row for row in documents(60) if keep(row)]
    of = CONFIG.tasks["qa"].document_instruction
    texts = [document_text(row["title"], row["text"]) for row in rows]
    vectors = embedder.encode(texts, instruction=of, max_tokens=16, batch_tokens=4096)
    instruction = CONFIG.tasks[task].query_instruction
    asked = embedder.encode([query], instruction=instruction, max_tokens=12, batch_tokens=4096)[0]
    scores = vectors @ asked
    order = np.argsort(-scores, kind="stable")[:k]
    return Found([rows[at]["doc_id"] for at in order], scores[order].tolist())


# --- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["qa", "chat"])
def test_results_are_those_of_brute_force(server: Server, docs: World, task: str) -> None:
    """The task's name chooses the instruction; a wrong one only shows as worse results."""
    answer = server.post("/v1/retrieve", {"query": "a b f c", "task": task, "top_k": 7}).json()
    expected = brute_force(docs, "a b f c", task, 7)
    [hits] = answer["results"]
    assert [hit["id"] for hit in hits] == expected.ids
    np.testing.assert_allclose([hit["score"] for hit in hits], expected.scores, atol=1e-5)
    assert answer["index_snapshot"] == docs.current
    assert answer["partial"] is False
    rows = {row["doc_id"]: row for row in documents(60)}
    for hit in hits:
        assert hit["text"] == rows[hit["id"]]["text"]
        assert hit["metadata"] == json.loads(rows[hit["id"]]["meta"])
        assert hit.get("title") == rows[hit["id"]]["title"]


def test_several_queries_are_answered_as_one_by_one(server: Server) -> None:
    """A mixed-up order in a batch gives every client somebody else's results."""
    queries = ["a b", "c d e", "f", "a b", "j i h g f"]
    together = server.post("/v1/retrieve", {"queries": queries, "task": "qa"}).json()["results"]
    for query, hits in zip(queries, together, strict=True):
        [alone] = server.post("/v1/retrieve", {"query": query, "task": "qa"}).json()["results"]
        assert [hit["id"] for hit in alone] == [hit["id"] for hit in hits]


def test_filters_choose_before_the_search(server: Server, docs: World) -> None:
    """Filtering what was found would return fewer than top_k, or nothing."""
    chosen = {"type": "and", "filters": [{"type": "eq", "key": "lang", "value": "en"},
                                         {"type": "gte", "key": "year", "value": 2010}]}  # fmt: skip
    answer = server.post("/v1/retrieve", {"query": "a b f", "task": "qa", "top_k": 5, "filter": chosen}).json()

    def keep(row: dict[str, Any]) -> bool:
        meta = json.loads(row["meta"])
        return meta["lang"] == "en" and meta["year"] >= 2010

    assert [hit["id"] for hit in answer["results"][0]] == brute_force(docs, "a b f", "qa", 5, keep).ids
    qdrant = {"must": [{"key": "position", "range": {"lt": 3}}]}
    answer = server.post("/v1/retrieve", {"query": "a", "task": "qa", "filter": qdrant, "with_text": False}).json()
    assert {hit["id"] for hit in answer["results"][0]} == {"d0-0", "d0-1", "d0-2"}
    assert all("text" not in hit for hit in answer["results"][0])
    nothing = {"type": "eq", "key": "lang", "value": "fr"}
    assert server.post("/v1/retrieve", {"query": "a", "task": "qa", "filter": nothing}).json()["results"] == [[]]


def test_more_than_there_is_and_floors(server: Server) -> None:
    """Padding of short results must not come out as a document."""
    [hits] = server.post("/v1/retrieve", {"query": "a", "task": "qa", "top_k": 1000}).json()["results"]
    assert len(hits) == 60
    floor = hits[9]["score"]
    body = {"query": "a", "task": "qa", "top_k": 1000, "min_score": floor}
    [some] = server.post("/v1/retrieve", body).json()["results"]
    assert [hit["id"] for hit in some] == [hit["id"] for hit in hits if hit["score"] >= floor]


def test_shard_groups_answer_as_one_process(server: Server, docs: World) -> None:
    """How an index is spread over processes may change no answer."""
    split = docs.service(docs.settings(shard_groups=2), groups=2)
    more = docs.service(docs.settings(shard_groups=5), groups=5)  # more groups than shards
    from llmr_ray.serving.gate import Call

    for body in (
        {"queries": ["a b", "c", "j"], "task": "chat", "top_k": 25},
        {"query": "a", "task": "qa", "filter": {"type": "eq", "key": "pool", "value": "odd"}},
    ):
        expected = server.post("/v1/retrieve", body).json()["results"]
        for service in (split, more):
            call = Call(request_id="r", route="retrieve")
            assert asyncio.run(service.retrieve(call, json.dumps(body).encode()))["results"] == expected


# --- OpenAI's client -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_official_client_embeds(client: openai.OpenAI, server: Server) -> None:
    """The client asks for base64 unless told otherwise, and decodes what it gets as float32."""
    for settings in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="docs", input=["a b", "c"], **settings)
        assert [row.index for row in answer.data] == [0, 1]
        vectors = [row.embedding for row in answer.data]
        if settings.get("encoding_format") == "base64":
            raw = [base64.b64decode(vector) for vector in vectors]
            vectors = [struct.unpack(f"<{len(item) // 4}f", item) for item in raw]
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    names = [model.id for model in client.models.list()]
    assert {"docs", "docs/qa-query", "docs/qa-document", "docs/rerank"} <= set(names)


def test_the_models_name_chooses_the_instruction(client: openai.OpenAI, docs: World) -> None:
    """Clients that know nothing of tasks still have to embed queries as the index expects them."""
    from llmr_ray.modeling.embedder import Embedder

    embedder = Embedder(docs.model, max_query_tokens=12, max_document_tokens=16, precision="float32")

    def alone(instruction: str, max_tokens: int) -> np.ndarray:
        return embedder.encode(["a b"], instruction=instruction, max_tokens=max_tokens, batch_tokens=64)[0]

    qa = CONFIG.tasks["qa"]
    for model, extra, expected in (
        ("docs", {}, alone("", 12)),
        ("docs/qa-query", {}, alone(qa.query_instruction, 12)),
        ("docs/qa-document", {}, alone(qa.document_instruction, 16)),
        ("docs", {"task": "chat", "input_type": "document"}, alone("z z ", 16)),
    ):
        answer = client.embeddings.create(model=model, input="a b", extra_body=extra)
        np.testing.assert_allclose(answer.data[0].embedding, expected, atol=1e-5)


def test_the_official_client_searches_a_vector_store(client: openai.OpenAI, server: Server) -> None:
    """The form of OpenAI's vector stores has to be the one its client parses."""
    chosen = {"type": "eq", "key": "lang", "value": "en"}
    page = client.vector_stores.search(
        "docs", query="a b", max_num_results=3, filters=chosen, extra_body={"task": "qa"}
    )
    body = {"query": "a b", "task": "qa", "top_k": 3, "filter": chosen}
    [hits] = server.post("/v1/retrieve", body).json()["results"]
    assert [(row.file_id, row.content[0].text) for row in page.data] == [(hit["id"], hit["text"]) for hit in hits]
    both = client.vector_stores.search("docs", query=["a b", "j"], max_num_results=3, extra_body={"task": "qa"})
    assert len(both.data) == 3
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.search("other", query="a", extra_body={"task": "qa"})


def test_the_official_client_understands_errors(client: openai.OpenAI) -> None:
    """Its exceptions come from status and body; another shape leaves the user with a bare number."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="gpt-zanzibar", input="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="Token ids are those"):
        client.embeddings.create(model="docs", input=[1, 2, 3])
    with pytest.raises(openai.UnprocessableEntityError, match="16 values"):
        client.embeddings.create(model="docs", input="a", dimensions=8)
    assert client.embeddings.create(model="docs", input="a", dimensions=16).data


# --- reranking -------------------------------------------------------------------------------------------------------


def test_reranking_equals_the_cross_encoder(server: Server, reranker: Path) -> None:
    """Pairs put together in another way than in training give plausible nonsense."""
    model = CrossEncoder(reranker, max_tokens=24)
    texts = ["c d", "a b", "e " * 30, "f"]
    left = np.asarray(model.tokenize(["a b"])[0], np.int32)
    pairs = [model.template.pair(left, np.asarray(ids, np.int32)) for ids in model.tokenize(texts)]
    logits = [float(model.score([pair], 4096)[0]) for pair in pairs]
    body = {"query": "a b", "documents": [texts[0], {"text": texts[1]}, *texts[2:]], "return_documents": True}
    answer = server.post("/v1/rerank", body).json()
    assert [row["index"] for row in answer["results"]] == np.argsort([-logit for logit in logits]).tolist()
    for row in answer["results"]:
        assert row["relevance_score"] == pytest.approx(1 / (1 + np.exp(-logits[row["index"]])), abs=1e-5)
        assert row["document"]["text"] == texts[row["index"]]
    assert len(server.post("/v1/rerank", body | {"top_n": 2}).json()["results"]) == 2


def test_an_encoder_without_a_head_does_not_rank(docs: World) -> None:
    """A head of random weights would rank at random, with confidence."""
    from llmr_ray.errors import ConfigError

    with pytest.raises(ConfigError, match="no trained head"):
        docs.service(docs.settings(reranker=str(docs.model), reranker_max_tokens=24))


# --- what is refused -------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, bytes, int]] = {
    "NaN": ("/v1/retrieve", b'{"query": "zanzibar", "task": "qa", "min_score": NaN}', 400),
    "lone surrogate": ("/v1/retrieve", b'{"query": "zanzibar \\ud800", "task": "qa"}', 422),
    "bad UTF-8": ("/v1/retrieve", b'{"query": "zanzibar \xff", "task": "qa"}', 400),
    "deep": ("/v1/retrieve", b'{"query": "zanzibar", "filter": ' + b"[" * 40000 + b"]" * 40000 + b"}", 400),
    "unknown task": ("/v1/retrieve", b'{"query": "a", "task": "zanzibar"}', 422),
    "no task of several": ("/v1/retrieve", b'{"query": "zanzibar"}', 422),
    "unknown model": ("/v1/retrieve", b'{"query": "a", "task": "qa", "model": "zanzibar"}', 404),
    "filter of no form": ("/v1/retrieve", b'{"query": "a", "task": "qa", "filter": {"zanzibar": 1}}', 422),
    "filter too deep": (
        "/v1/retrieve",
        b'{"query": "a", "task": "qa", "filter": ' + b'{"type": "and", "filters": [' * 12
        + b'{"type": "eq", "key": "zanzibar", "value": 1}' + b"]}" * 12 + b"}",
        422,
    ),
    "filter of many clauses": (
        "/v1/retrieve",
        json.dumps({"query": "a", "task": "qa", "filter": {"must": [
            {"key": "zanzibar", "match": {"value": 1}}] * 65}}).encode(),
        422,
    ),
    "unknown store": ("/v1/vector_stores/zanzibar/search", b'{"query": "a", "task": "qa"}', 404),
    "a path for a store": ("/v1/vector_stores/..%2f..%2fzanzibar/search", b'{"query": "a"}', 404),
    "unknown route": ("/v1/zanzibar", b"{}", 404),
    "another method": ("/info", b"{}", 405),
    "dimensions of another model": ("/v1/embeddings", b'{"input": "zanzibar", "model": "docs", "dimensions": 7}', 422),
    "large": ("/v1/retrieve", b'{"query": "' + b"zanzibar" * 20_000 + b'"}', 413),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status"), BAD.values(), ids=BAD.keys())
def test_bad_requests_over_http(server: Server, path: str, body: bytes, status: int) -> None:
    """What a parser lets through and a layer below trips over comes out as a 500, or as an echo."""
    headers = {"content-type": "application/json"}
    started = time.perf_counter()
    answer = HTTP.post(server.url + path, content=body, headers=headers, timeout=30)
    assert time.perf_counter() - started < 2
    assert answer.status_code == status
    assert answer.json()["error"].keys() == {"message", "type", "code", "param", "request_id"}
    assert SECRET not in answer.text
    assert len(answer.content) < 4096


def test_bodies_without_length_or_of_another_type(server: Server) -> None:
    """A limit that trusts Content-Length is none; a form post from another site needs no permission of a browser."""

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.WriteError):  # the connection was closed while we still sent
        assert HTTP.post(f"{server.url}/v1/retrieve", content=endless(), headers=headers).status_code == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = HTTP.post(f"{server.url}/v1/retrieve", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415


def test_a_body_that_drips_is_cut_off(server: Server) -> None:
    """Clients that send a byte a second would hold connections and memory for ever."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        started = time.monotonic()
        connection.settimeout(10)
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
        assert b" 408 " in received.splitlines()[0]
        assert time.monotonic() - started < 5


def test_work_ends_when_its_client_leaves(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that time out and ask again would otherwise leave a growing heap of work for nobody."""
    cancelled, begun = threading.Event(), threading.Event()

    async def endless(prompted: Any) -> np.ndarray:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    monkeypatch.setattr(server.service.engine.encoder, "encode", endless)
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{server.url}/v1/retrieve", json={"query": "a", "task": "qa"}, timeout=0.3)
    assert begun.is_set()
    assert cancelled.wait(5)
    deadline = time.monotonic() + 5
    while server.service.gate.admission.working and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.service.gate.admission.working == 0


def test_who_left_the_queue_is_not_worked_for(docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an overload the server would go on answering those who gave up long ago."""
    running = Server(docs.service(docs.settings(max_concurrent=1)))
    begun: list[list[str]] = []
    release = threading.Event()

    async def slow(prompted: Any) -> np.ndarray:
        begun.append([text for text, *_ in prompted])
        while not release.is_set():
            await asyncio.sleep(0.01)
        raise ValueError

    def ask(text: str, timeout: float) -> int:
        body = {"query": text, "task": "qa"}
        return HTTP.post(f"{running.url}/v1/retrieve", json=body, timeout=timeout).status_code

    monkeypatch.setattr(running.service.engine.encoder, "encode", slow)
    try:
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(ask, "stays", 30)
            until(lambda: begun, 10)
            with pytest.raises(httpx.ReadTimeout):
                ask("leaves", 0.3)
            last = clients.submit(ask, "comes later", 30)
            until(lambda: running.service.gate.admission.waiting == 2, 10)
            release.set()
            assert (first.result(), last.result()) == (500, 500)
    finally:
        release.set()
        running.close()
    assert begun == [["stays"], ["comes later"]]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("zanzibar"), 500), (MemoryError("zanzibar"), 500), (KeyError("zanzibar"), 500)]
)
def test_defects_do_not_speak(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, status: int
) -> None:
    """The words of an exception are often those of the query."""

    async def broken(prompted: Any) -> np.ndarray:
        raise error

    monkeypatch.setattr(server.service.engine.encoder, "encode", broken)
    answer = server.post("/v1/retrieve", {"query": "zanzibar", "task": "qa"})
    assert answer.status_code == status
    assert SECRET not in answer.text
    assert SECRET not in caplog.text
    assert "test_serving_api.py" in caplog.text


def test_slow_work_is_a_504_and_a_full_house_a_429(docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overload must be told at once and with a time to come back, and pass without a trace."""
    settings = docs.settings(max_concurrent=2, max_queued=1, request_timeout_s=1.0)
    running = Server(docs.service(settings))
    try:
        good = running.service.engine.encoder.encode

        async def slow(prompted: Any) -> np.ndarray:
            await asyncio.sleep(60)
            raise AssertionError

        monkeypatch.setattr(running.service.engine.encoder, "encode", slow)

        async def flood() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=30) as many:
                body = {"query": "a", "task": "qa"}
                return await asyncio.gather(*(many.post(f"{running.url}/v1/retrieve", json=body) for _ in range(8)))

        answers = asyncio.run(flood())
        assert sorted(answer.status_code for answer in answers) == [429] * 5 + [504] * 3
        for answer in answers:
            assert int(answer.headers["retry-after"]) >= 1
            kind = "rate_limit_error" if answer.status_code == 429 else "server_error"
            assert answer.json()["error"]["type"] == kind
        monkeypatch.setattr(running.service.engine.encoder, "encode", good)
        assert running.post("/v1/retrieve", {"query": "a", "task": "qa"}).status_code == 200
    finally:
        running.close()


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(docs: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str], Path]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {
        "reader": add_key(path, "reader", ("read",)),
        "admin": add_key(path, "admin", ("admin",)),
        "tenant": add_key(path, "tenant", ("read",), {"type": "eq", "key": "lang", "value": "en"}),
    }
    running = Server(docs.service(docs.settings(keys_file=str(path))))
    yield running, keys, path
    running.close()


OPEN = {"/healthz", "/readyz", "/"}
BODIES = {
    "/v1/retrieve": {"query": "a", "task": "qa"},
    "/v1/embeddings": {"input": "a", "model": "docs"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/vector_stores/{vector_store_id}/search": {"query": "a", "task": "qa"},
    "/admin/reload": {},
}


def test_every_route_asks_for_a_key(guarded: tuple[Server, dict[str, str], Path]) -> None:
    """One forgotten route is an open door: the list is that of the OpenAPI document."""
    server, keys, _ = guarded
    bearer = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    document = HTTP.get(f"{server.url}/openapi.json", headers=bearer["reader"]).json()
    routes = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert {path for path, _ in routes} >= {"/v1/retrieve", "/metrics", "/info", "/admin/reload", *OPEN}
    seen = 0
    for path, method in routes:
        url = server.url + path.replace("{vector_store_id}", "docs")

        def status(headers: dict[str, str], url: str = url, path: str = path, method: str = method) -> int:
            return HTTP.request(method, url, json=BODIES.get(path), headers=headers).status_code

        if path in OPEN:
            assert status({}) == 200
            continue
        seen += 1
        needs_admin = path in ("/metrics", "/admin/reload")
        for wrong in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer"},
            {"authorization": keys["admin"]},
            {"authorization": f"Basic {keys['admin']}"},
            {"authorization": f"Bearer {keys['admin'][:-1]}"},
            {"x-api-key": keys["admin"]},
        ):
            assert status(wrong) == 401, (path, wrong)
        assert status(bearer["reader"]) == (403 if needs_admin else 404 if path == "/v1/rerank" else 200), path
        assert status(bearer["admin"]) == (404 if path == "/v1/rerank" else 200), path
    assert seen >= 9


def test_a_key_sees_its_own_documents_alone(guarded: tuple[Server, dict[str, str], Path]) -> None:
    """Whatever a tenant filters by, also nothing, others' documents are not found."""
    server, keys, _ = guarded
    for chosen in (
        None,
        {"type": "eq", "key": "lang", "value": "de"},
        {"type": "or", "filters": [{"type": "ne", "key": "lang", "value": "x"}]},
        {"must_not": []},
    ):
        body = {"query": "a", "task": "qa", "top_k": 100, "filter": chosen}
        [hits] = server.post("/v1/retrieve", body, authorization=f"Bearer {keys['tenant']}").json()["results"]
        assert all(hit["metadata"]["lang"] == "en" for hit in hits)
        assert len(hits) == (0 if chosen and chosen.get("value") == "de" else 20)


def test_keys_change_while_the_server_runs(
    guarded: tuple[Server, dict[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revoked key that is still let in is not revoked."""
    monkeypatch.setattr(keys_module, "LOOK_SECONDS", 0.0)
    server, _, path = guarded
    time.sleep(0.6)
    key = add_key(path, "short", ("read",))
    headers = {"authorization": f"Bearer {key}"}
    assert HTTP.get(f"{server.url}/info", headers=headers).status_code == 200
    revoke_key(path, "short")
    assert HTTP.get(f"{server.url}/info", headers=headers).status_code == 401


def test_without_keys_only_local_names_are_answered(docs: World) -> None:
    """A page whose name was pointed to 127.0.0.1 runs in the user's browser and may read what the browser may."""
    service = docs.service()
    service.gate._only_local = True
    running = Server(service)
    try:
        for host, status in (
            ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:80", 200), ("evil.example", 403),
            ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
        ):  # fmt: skip
            assert HTTP.get(f"{running.url}/info", headers={"host": host}).status_code == status
    finally:
        running.close()


# --- evaluation ------------------------------------------------------------------------------------------------------


def offline(docs: World, depth: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]], pa.Table]:
    """Queries with labels and histories, and their rankings by comparing stored vectors with all in their range."""
    index = read_manifest(docs.collection, docs.current)["segments"][0]
    embeddings = Artifact.found(docs.root, index["embeddings"])
    vectors = {name: to_matrix(embeddings.read(f"{name}_embeddings")) for name in ("document", "query")}
    corpus = documents(60)
    asked = [row | {"history_end": 7 if at % 4 == 1 else 45 if at % 4 == 2 else None}
             for at, row in enumerate(queries(12))]  # fmt: skip
    qrels, run = {}, []
    for at, query in enumerate(asked):
        limit = query["history_end"] if query["history_end"] is not None else 60
        rows = [row for row, doc in enumerate(corpus) if doc["pool"] == query["pool"] and doc["position"] < limit]
        scores = vectors["document"][rows] @ vectors["query"][at]
        order = np.argsort(-scores, kind="stable")[:depth]
        run += [
            {"run_name": "trained", "query_id": query["query_id"], "doc_id": corpus[rows[place]]["doc_id"],
             "rank": rank, "score": float(scores[place])}
            for rank, place in enumerate(order, 1)
        ]  # fmt: skip
        if at != 5:
            qrels[query["query_id"]] = {corpus[row]["doc_id"]: 1 for row in rows[:3]}
    return asked, qrels, table_of("run", run)


def test_a_server_measures_as_the_run_did(server: Server, docs: World) -> None:
    """Each query must see its own range of documents, under its own task; else a server looks better or worse."""
    asked, qrels, run = offline(docs, 20)
    found = endpoint.compare(asked, qrels, run, "trained", Client(server.url), depth=20)
    assert (found.num_queries, found.num_same, found.snapshots) == (11, 11, [docs.current])
    assert found.max_score_difference < 1e-5
    assert {(row.dataset, row.measure, row.n) for row in found.figures} >= {("one", "nDCG@10", 5), ("two", "R@10", 6)}
    for row in found.figures:
        assert row.offline == row.served
        assert 0 < row.served <= 1
    with pytest.raises(DataError, match="ranked no labelled query"):
        endpoint.compare(asked, qrels, run, "base", Client(server.url), depth=20)


def test_a_busy_or_refusing_server_is_told(server: Server, docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that takes an error for an empty ranking reports a bad retriever."""
    asked, qrels, run = offline(docs, 5)
    elsewhere = [query | {"task": "nowhere"} for query in asked]
    with pytest.raises(RequestRefusedError, match="`task` must be"):
        endpoint.compare(elsewhere, qrels, run, "trained", Client(server.url), depth=5)
    with pytest.raises(ServerUnavailableError, match="does not answer"):
        endpoint.compare(asked, qrels, run, "trained", Client("http://127.0.0.1:9", max_retries=0), depth=5)
    calls = []

    async def busy_twice(prompted: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) < 3:
            raise RequestError(429, "busy", code="overloaded", retry_after=1)
        return await encode(prompted)

    encode = server.service.engine.encoder.encode
    monkeypatch.setattr(server.service.engine.encoder, "encode", busy_twice)
    found = endpoint.compare(asked, qrels, run, "trained", Client(server.url), depth=5, num_clients=1)
    assert (found.num_same, len(calls)) == (11, 13)


# --- what is told ----------------------------------------------------------------------------------------------------


def test_logs_and_metrics_hold_no_text(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Queries are people's; logs are kept for years and read by many."""
    caplog.set_level("INFO")
    answer = server.post("/v1/retrieve", {"query": "zanzibar b", "task": "qa"}, **{"x-request-id": "abc-1"})
    server.post("/v1/embeddings", {"input": "zanzibar", "model": "docs"})
    server.post("/v1/retrieve", {"query": "zanzibar", "task": "nowhere"})
    metrics = HTTP.get(f"{server.url}/metrics").text
    assert SECRET not in caplog.text
    assert SECRET not in metrics
    assert answer.headers["x-request-id"] == "abc-1"
    lines = [json.loads(record.message) for record in caplog.records if record.name == "llmr_ray.serving.access"]
    told = next(line for line in lines if line["request_id"] == "abc-1")
    assert (told["route"], told["status"], told["queries"], told["chars"]) == ("retrieve", 200, 1, 10)
    assert told["snapshot"] == answer.json()["index_snapshot"]
    for name in (
        "llmr_retrieve_requests_total", "llmr_retrieve_latency_seconds_bucket", "llmr_index_snapshot_age_seconds",
        "llmr_index_shards_missing", "llmr_index_snapshot_info",
    ):  # fmt: skip
        assert re.search(rf"^{name}[{{ ]", metrics, flags=re.MULTILINE), name
    assert 'llmr_retrieve_requests_total{code="422",route="retrieve"}' in metrics


def test_wrong_paths_and_methods_are_told_in_our_words(server: Server) -> None:
    """A redirect to the path without its slash would repeat the query string and whatever Host is given, without a
    key; who took the wrong method wants to know the right one."""
    for path in ("/v1/models/", f"/v1/models/?{SECRET}", f"/{SECRET}"):
        answer = HTTP.get(f"{server.url}{path}", headers={"host": f"{SECRET}.example"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert SECRET not in f"{answer.headers}{answer.text}"
    answer = HTTP.get(f"{server.url}/v1/retrieve")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_request_ids_cannot_carry_text(server: Server) -> None:
    """A header that is copied into logs and answers must not carry lines of its own."""
    for bad in ("x" * 65, "a b", 'a"b', "<script>"):
        answer = HTTP.get(f"{server.url}/info", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"] != bad


def test_the_page_runs_nothing_but_its_own(server: Server) -> None:
    """A document's text is shown on the page; it must not become part of it."""
    answer = HTTP.get(f"{server.url}/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://", answer.text.replace("http://www.w3.org/2000/svg", ""))
    assert "innerHTML" not in answer.text


def test_info_and_readiness(server: Server, docs: World) -> None:
    """What is served can be told from outside, so that a deployment can wait for it."""
    info = HTTP.get(f"{server.url}/info").json()
    opened = OpenSnapshot(docs.root, "docs", docs.current, shards=())
    assert info["index_snapshot"] == docs.current
    assert info["encoder"] == opened.encoder
    assert (info["num_documents"], info["dimension"], info["tasks"]) == (60, 16, ["chat", "qa"])
    assert HTTP.get(f"{server.url}/readyz").json() == {"status": "ready", "index_snapshot": docs.current}
    assert HTTP.get(f"{server.url}/healthz").json() == {"status": "ok"}
