"""What the server takes, and how it says no."""

import base64
import json
import math
import pickle
import struct
import time
from typing import Any

import pytest

from llmr_ray.errors import ConfigError
from llmr_ray.serving.protocol import (
    EmbeddingsRequest,
    Hit,
    RequestError,
    RerankRequest,
    RetrieveRequest,
    SearchRequest,
    embedding,
    parse,
    search_page,
    to_json,
    to_json_in_steps,
)
from llmr_ray.serving.settings import ServingSettings

LIMITS = ServingSettings(
    max_body_bytes=4000, max_text_chars=100, max_texts=3, max_documents=4, max_top_k=20, max_results=40
)

SECRET = "zanzibar"
"""Stands in every bad request; no error may hold it."""


def deep(levels: int) -> bytes:
    return b'{"query": "zanzibar", "filter": ' + b'{"a": ' * levels + b"1" + b"}" * levels + b"}"


BAD: dict[str, tuple[type, bytes, int]] = {
    "empty": (RetrieveRequest, b"", 400),
    "no JSON": (RetrieveRequest, b"zanzibar", 400),
    "half JSON": (RetrieveRequest, b'{"query": "zanzibar', 400),
    "bad UTF-8": (RetrieveRequest, b'{"query": "zanzibar \xff"}', 400),
    "UTF-16": (RetrieveRequest, '{"query": "zanzibar"}'.encode("utf-16"), 400),
    "a list": (RetrieveRequest, b'["zanzibar"]', 400),
    "a number": (RetrieveRequest, b"7", 400),
    "null": (RetrieveRequest, b"null", 400),
    "NaN": (RetrieveRequest, b'{"query": "zanzibar", "min_score": NaN}', 400),
    "infinity": (RetrieveRequest, b'{"query": "zanzibar", "min_score": -Infinity}', 400),
    "a number that overflows": (RetrieveRequest, b'{"query": "zanzibar", "min_score": 1e999}', 400),
    "an endless integer": (RetrieveRequest, b'{"query": "zanzibar", "top_k": ' + b"9" * 3900 + b"}", 422),
    "a huge integer": (RetrieveRequest, b'{"query": "zanzibar", "top_k": 99999999999999999999}', 422),
    "lone surrogate": (RetrieveRequest, b'{"query": "zanzibar \\ud800"}', 422),
    "lone surrogate in a filter": (RetrieveRequest, b'{"query": "x", "filter": {"zanzibar": "\\udfff"}}', 422),
    "duplicate key": (RetrieveRequest, b'{"query": "zanzibar", "query": "y"}', 400),
    "duplicate key inside": (RetrieveRequest, b'{"query": "x", "filter": {"zanzibar": 1, "zanzibar": 2}}', 400),
    "too deep": (RetrieveRequest, deep(33), 400),
    "far too deep": (RetrieveRequest, deep(500), 400),
    "deep lists": (RetrieveRequest, b'{"query": ' + b"[" * 1900 + b"]" * 1900 + b"}", 400),
    "unknown field": (RetrieveRequest, b'{"query": "x", "zanzibar": 1}', 422),
    "no query": (RetrieveRequest, b'{"task": "zanzibar"}', 422),
    "query and queries": (RetrieveRequest, b'{"query": "zanzibar", "queries": ["y"]}', 422),
    "query is a number": (RetrieveRequest, b'{"query": 7, "task": "zanzibar"}', 422),
    "query is null": (RetrieveRequest, b'{"query": null, "task": "zanzibar"}', 422),
    "empty query": (RetrieveRequest, b'{"query": "", "task": "zanzibar"}', 422),
    "blank query": (RetrieveRequest, b'{"query": " \\n\\t ", "task": "zanzibar"}', 422),
    "no queries": (RetrieveRequest, b'{"queries": [], "task": "zanzibar"}', 422),
    "an empty one among queries": (RetrieveRequest, b'{"queries": ["zanzibar", ""]}', 422),
    "null among queries": (RetrieveRequest, b'{"queries": ["zanzibar", null]}', 422),
    "too many queries": (RetrieveRequest, b'{"queries": ["zanzibar", "b", "c", "d"]}', 422),
    "long query": (RetrieveRequest, json.dumps({"query": SECRET * 20}).encode(), 413),
    "top_k 0": (RetrieveRequest, b'{"query": "zanzibar", "top_k": 0}', 422),
    "top_k -1": (RetrieveRequest, b'{"query": "zanzibar", "top_k": -1}', 422),
    "top_k above": (RetrieveRequest, b'{"query": "zanzibar", "top_k": 21}', 422),
    "too many results with text": (RetrieveRequest, b'{"queries": ["zanzibar", "b", "c"], "top_k": 14}', 422),
    "too many results of a store": (SearchRequest, b'{"query": ["zanzibar", "b", "c"], "max_num_results": 14}', 422),
    "top_k half": (RetrieveRequest, b'{"query": "zanzibar", "top_k": 1.5}', 422),
    "top_k true": (RetrieveRequest, b'{"query": "zanzibar", "top_k": true}', 422),
    "top_k in words": (RetrieveRequest, b'{"query": "zanzibar", "top_k": "3"}', 422),
    "filter is a list": (RetrieveRequest, b'{"query": "zanzibar", "filter": []}', 422),
    "large body": (RetrieveRequest, b'{"query": "zanzibar"}' + b" " * 4000, 413),
    "input is a number": (EmbeddingsRequest, b'{"input": 5, "model": "zanzibar"}', 422),
    "token ids": (EmbeddingsRequest, b'{"input": [1, 2], "model": "zanzibar"}', 422),
    "lists of token ids": (EmbeddingsRequest, b'{"input": [[1, 2]], "model": "zanzibar"}', 422),
    "no model": (EmbeddingsRequest, b'{"input": "zanzibar"}', 422),
    "unknown format": (EmbeddingsRequest, b'{"input": "x", "model": "m", "encoding_format": "zanzibar"}', 422),
    "no dimensions": (EmbeddingsRequest, b'{"input": "zanzibar", "model": "m", "dimensions": 0}', 422),
    "empty input": (EmbeddingsRequest, b'{"input": [], "model": "zanzibar"}', 422),
    "too many inputs": (EmbeddingsRequest, b'{"input": ["zanzibar", "b", "c", "d"], "model": "m"}', 422),
    "no documents": (RerankRequest, b'{"query": "zanzibar", "documents": []}', 422),
    "too many documents": (RerankRequest, b'{"query": "zanzibar", "documents": ["1", "2", "3", "4", "5"]}', 422),
    "a document without text": (RerankRequest, b'{"query": "x", "documents": [{"zanzibar": 1}]}', 422),
    "long document": (RerankRequest, json.dumps({"query": "x", "documents": [SECRET * 20]}).encode(), 413),
    "51 results": (SearchRequest, b'{"query": "zanzibar", "max_num_results": 51}', 422),
    "rewriting": (SearchRequest, b'{"query": "zanzibar", "rewrite_query": true}', 422),
    "unknown ranker": (SearchRequest, b'{"query": "x", "ranking_options": {"ranker": "zanzibar"}}', 422),
}


@pytest.mark.parametrize(("kind", "body", "status"), BAD.values(), ids=BAD.keys())
def test_bad_requests_are_refused_fast_briefly_and_without_their_words(kind: Any, body: bytes, status: int) -> None:
    """A server that echoes 100 MB inside an error, fails with 500 on NaN, or thinks for a minute is easily killed."""
    started = time.perf_counter()
    with pytest.raises(RequestError) as caught:
        parse(kind, body, LIMITS)
    assert time.perf_counter() - started < 1
    error = caught.value
    assert error.status == status
    told = to_json(error.body("r1")).decode()
    assert len(told) < 1000
    assert SECRET not in told
    inner = json.loads(told)["error"]
    assert inner.keys() == {"message", "type", "code", "param", "request_id"}
    assert inner["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b'{"query": ' + b"[" * 1_000_000,
        b'{"a": "' + b'\\"' * 900_000,
        b'{"a": "' + b"\\" * 1_800_001,
        b"[]," * 600_000,
        b'"[' * 900_000,
        b"{" * 1_900_000,
    ],
    ids=["open brackets", "escaped quotes", "backslashes", "pairs", "quotes", "braces"],
)
def test_hostile_nesting_takes_linear_time(body: bytes) -> None:
    """A check of the depth that looks at strings again and again takes hours for two megabytes."""
    started = time.perf_counter()
    with pytest.raises(RequestError):
        parse(RetrieveRequest, body, ServingSettings())
    assert time.perf_counter() - started < 3


def test_brackets_inside_texts_are_no_nesting() -> None:
    """A query of source code has many brackets; it is one string."""
    text = '[[[{"' * 15
    assert parse(RetrieveRequest, json.dumps({"query": text}).encode(), LIMITS).query == text


def test_good_requests_pass_with_their_defaults() -> None:
    """Whole ranges of Unicode are good text, escaped or not."""
    for query in ("a", "naïve 日本語 😀", "a\u0000b", "a\nb"):
        for ascii_only in (True, False):
            body = json.dumps({"query": query}, ensure_ascii=ascii_only).encode()
            asked = parse(RetrieveRequest, body, LIMITS)
            assert (asked.texts, asked.top_k, asked.with_text, asked.filter) == ([query], 10, True, None)
    assert parse(RetrieveRequest, b'{"queries": ["a", "b"], "min_score": 1}', LIMITS).min_score == 1
    assert parse(RerankRequest, b'{"query": "q", "documents": ["a", {"text": "b"}]}', LIMITS).texts == ["a", "b"]
    asked = parse(SearchRequest, b'{"query": "q", "ranking_options": {"score_threshold": 0.5}}', LIMITS).as_retrieval()
    assert (asked.texts, asked.min_score, asked.top_k) == (["q"], 0.5, 10)


def test_embeddings_are_written_as_openai_does() -> None:
    """Clients ask for base64 unseen; other byte orders or float64 decode to noise without an error."""
    vector = [0.1, -2.5, 3e-8]
    single = struct.unpack("<3f", struct.pack("<3f", *vector))
    raw = embedding(vector, "base64")
    assert isinstance(raw, str)
    assert struct.unpack("<3f", base64.b64decode(raw)) == single
    assert embedding(vector, "float") == vector


def test_a_vector_stores_page_holds_each_document_once_and_best_first() -> None:
    """Several queries find the same document; OpenAI's form has one list."""
    first = [Hit(doc_id="a", retrieval_score=0.5, text="A", metadata={"x": 1, "y": [1]})]
    second = [Hit(doc_id="b", retrieval_score=0.7, text="B"), Hit(doc_id="a", retrieval_score=0.6, text="A")]
    page = search_page([first, second], ["q", "r"], "docs", 10)
    assert [(row["file_id"], row["score"]) for row in page["data"]] == [("b", 0.7), ("a", 0.6)]
    assert page["data"][0]["content"] == [{"type": "text", "text": "B"}]
    assert search_page([first], ["q"], "docs", 10)["data"][0]["attributes"] == {"x": 1}


def test_a_vector_stores_page_is_no_longer_than_asked_for() -> None:
    """OpenAI's max_num_results is of the page; n queries made n times as many."""
    found = [[Hit(doc_id=f"{query}{at}", retrieval_score=at + query / 10) for at in (3, 2, 1)] for query in range(4)]
    page = search_page(found, list("qrst"), "docs", 3)
    assert [row["score"] for row in page["data"]] == [3.3, 3.2, 3.1]


def test_results_without_text_are_not_counted() -> None:
    """The limit is of an answer's length; rankings without it may be deep. What is named is the caller's field."""
    deep = b'{"queries": ["a", "b", "c"], "top_k": 20, "with_text": false}'
    assert parse(RetrieveRequest, deep, LIMITS).top_k == 20
    assert parse(RetrieveRequest, b'{"queries": ["a", "b"], "top_k": 20}', LIMITS).top_k == 20
    for kind, body, param in (
        (RetrieveRequest, b'{"queries": ["a", "b", "c"], "top_k": 20}', "top_k"),
        (SearchRequest, b'{"query": ["a", "b", "c"], "max_num_results": 14}', "max_num_results"),
        (SearchRequest, b'{"query": "a", "max_num_results": 21}', "max_num_results"),
    ):
        with pytest.raises(RequestError) as caught:
            parse(kind, body, LIMITS)
        assert (caught.value.status, caught.value.code, caught.value.param) == (422, "above_limit", param)


@pytest.mark.parametrize(
    "value",
    [
        {"results": [[{"id": "a", "text": "é\n"}, {"id": "b"}], [], [{}]], "n": 1, "partial": False, "none": None},
        {"data": [{"content": [{"text": "x"}], "attributes": {}}], "next_page": None},
        {},
        {"results": []},
        {"a": {"b": [1, [2, {"c": 3}]]}},
    ],
)
def test_a_large_answer_is_written_as_any_other(value: Any) -> None:
    """The steps only let other threads in between; not one byte may change."""
    assert to_json_in_steps(value) == to_json(value)
    with pytest.raises(ValueError, match="JSON"):
        to_json_in_steps(value | {"deep": [[{"score": math.inf}]]})


def test_nan_is_never_written() -> None:
    """Python writes NaN into JSON, which no other parser reads."""
    with pytest.raises(ValueError, match="JSON"):
        to_json({"score": math.nan})


def test_errors_cross_processes() -> None:
    """A shard group's error that cannot be unpickled fails the ingress instead of its request."""
    error = RequestError(429, "m", code="c", param="p", retry_after=2.0)
    again = pickle.loads(pickle.dumps(error))
    assert again.body("r") == error.body("r")
    assert again.retry_after == 2.0


def test_settings_come_from_the_environment_and_arguments() -> None:
    """Serve hands over strings; a limit that stays a string fails at the first request."""
    environment = {"LLMR_SERVE_MAX_TOP_K": "5", "LLMR_SERVE_FAST": "false", "LLMR_SERVE_PORT": "1", "OTHER": "x"}
    settings = ServingSettings.of({"max_texts": "7", "canary_min_overlap": "0.5", "max_top_k": 6}, environment)
    assert (settings.max_top_k, settings.fast, settings.max_texts, settings.canary_min_overlap) == (6, False, 7, 0.5)
    for values, environment in (
        ({"max_texts": "many"}, {}),
        ({"max_texts": "-1"}, {}),
        ({"fast": "perhaps"}, {}),
        ({"request_timeout_s": "nan"}, {}),
        ({"no_such": 1}, {}),
        ({}, {"LLMR_SERVE_NO_SUCH": "1"}),
    ):
        with pytest.raises(ConfigError):
            ServingSettings.of(values, environment)
