"""What the server's requests, answers and errors look like, and what it refuses before any work is done.

Pure functions on bytes and values. An error never repeats what was sent: neither values nor unknown names.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmr_ray.serving.settings import ServingSettings


class RequestError(Exception):
    """A request that is not answered, in OpenAI's form.

    Args:
        status: HTTP status.
        message: what was wrong, without anything of the request in it.
        code: a word that programs can rely on.
        param: the field that was wrong, if it is one that the server knows.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(status, message, code, param, retry_after)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.status, self.message, self.code, self.param, self.retry_after)

    def body(self, request_id: str) -> dict[str, Any]:
        """The answer's JSON."""
        error = {"message": self.message, "type": _TYPES.get(self.status, _kind(self.status)), "code": self.code}
        return {"error": error | {"param": self.param, "request_id": request_id}}


def _rebuild(status: int, message: str, code: str, param: str | None, retry_after: float | None) -> RequestError:
    return RequestError(status, message, code=code, param=param, retry_after=retry_after)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _kind(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


# --- bodies ----------------------------------------------------------------------------------------------------------

_BRACKETS = re.compile(r"[\[\]{}]")
# Always matches from a quote on, also to an end without its closing quote: no second look, no quadratic time.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)


def read_json(body: bytes, max_depth: int) -> dict[str, Any]:
    """A body's JSON object.

    Raises:
        RequestError: no UTF-8, no JSON, no object, too deep, a key twice, NaN or infinity, half of a surrogate pair.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        _refuse("the body is not UTF-8.")
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(text, max_depth)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        _refuse("a text holds half of a surrogate pair, which is no character.", code="invalid_text", status=422)
    except (ValueError, RecursionError):
        _refuse("the body is not valid JSON.")
    if not isinstance(value, dict):
        _refuse("the body must be a JSON object.")
    return value


def _check_depth(text: str, max_depth: int) -> None:
    depth = 0
    for bracket in _BRACKETS.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > max_depth:
            _refuse(f"the body is nested deeper than {max_depth} levels.", code="too_deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        _refuse("an object names a field twice.", code="duplicate_field")
    return made


def _no_number(_: str) -> NoReturn:
    _refuse("NaN and infinity are no JSON numbers.", code="not_finite")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        _refuse("a number is too large.", code="not_finite")
    return value


def _refuse(message: str, *, code: str = "invalid_json", param: str | None = None, status: int = 400) -> NoReturn:
    raise RequestError(status, message, code=code, param=param)


# --- requests --------------------------------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]


class RetrieveRequest(_Body):
    """`POST /v1/retrieve`: one query or several of a task."""

    query: str | None = None
    queries: list[str] | None = None
    task: str | None = None
    top_k: Count = 10
    filter: dict[str, Any] | None = None
    with_text: bool = True
    min_score: float | None = None
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        """The queries."""
        return self.queries if self.queries is not None else [self.query or ""]


class RankingOptions(_Body):
    """Of a vector store's search; there is one ranker."""

    ranker: Literal["auto", "none"] | None = None
    score_threshold: float | None = None


class SearchRequest(_Body):
    """`POST /v1/vector_stores/{id}/search`, OpenAI's form of a retrieval. `task` is ours."""

    query: str | list[str]
    max_num_results: Annotated[int, Field(ge=1, le=50)] = 10
    filters: dict[str, Any] | None = None
    ranking_options: RankingOptions | None = None
    rewrite_query: Literal[False] | None = None
    task: str | None = None

    def as_retrieval(self) -> RetrieveRequest:
        """The same, asked of /v1/retrieve."""
        texts = [self.query] if isinstance(self.query, str) else self.query
        threshold = self.ranking_options.score_threshold if self.ranking_options else None
        return RetrieveRequest(
            queries=texts, task=self.task, top_k=self.max_num_results, filter=self.filters, min_score=threshold
        )


class EmbeddingsRequest(_Body):
    """`POST /v1/embeddings`. `task` and `input_type` are ours: whose instruction stands before the texts.

    Token ids are refused: they would be those of another model's tokenizer.
    """

    input: str | list[str]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: str | None = None
    task: str | None = None
    input_type: Literal["query", "document"] = "query"

    @property
    def texts(self) -> list[str]:
        """The texts to embed."""
        return [self.input] if isinstance(self.input, str) else self.input


class RankedText(_Body):
    """A document to rank, as an object."""

    text: str


class RerankRequest(_Body):
    """`POST /v1/rerank`: the order of documents by a cross-encoder."""

    query: str
    documents: list[str | RankedText]
    top_n: Count | None = None
    return_documents: bool = False
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [item if isinstance(item, str) else item.text for item in self.documents]


_Request = TypeVar("_Request", bound=_Body)


def parse(kind: type[_Request], body: bytes, limits: ServingSettings) -> _Request:
    """A request of a kind from its body, within the limits.

    Raises:
        RequestError: 400 for what is no JSON object, 413 for too much, 422 for fields that are wrong.
    """
    if len(body) > limits.max_body_bytes:
        raise too_large(limits)
    value = read_json(body, limits.max_json_depth)
    if kind is EmbeddingsRequest and _holds_token_ids(value.get("input")):
        raise RequestError(
            422,
            "`input` must be text. Token ids are those of one tokenizer, and this model has another (LangChain's "
            "OpenAIEmbeddings sends text with check_embedding_ctx_length=False).",
            code="token_ids",
            param="input",
        )
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(kind, error) from None
    _check(request, limits)
    return request


def _holds_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | list)


def _invalid(kind: type[BaseModel], error: ValidationError) -> RequestError:
    """What is wrong, from the first error; its place only as far as the server itself knows the name."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = str(first["loc"][0]) if first["loc"] else ""
    param = place if place in kind.model_fields else None
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        return RequestError(422, f"the request has an unknown field. Known: {known}.", code="unknown_field")
    return RequestError(422, f"`{param or 'body'}`: {first['msg']}.", code="invalid_value", param=param)


def _check(request: _Body, limits: ServingSettings) -> None:
    depth = "top_k"
    if isinstance(request, SearchRequest):
        request, depth = request.as_retrieval(), "max_num_results"
    if isinstance(request, RetrieveRequest):
        if (request.query is None) == (request.queries is None):
            _refuse("give either `query` or `queries`.", code="invalid_value", param="query", status=422)
        if request.top_k > limits.max_top_k:
            raise above(depth, limits.max_top_k)
        check_texts(request.texts, limits, "query" if request.queries is None else "queries", limits.max_texts)
        if request.with_text and len(request.texts) * request.top_k > limits.max_results:
            message = (
                f"queries times `{depth}` may be {limits.max_results} at the most where texts come with the results. "
                "Ask for fewer, or send the queries in several requests."
            )
            raise RequestError(422, message, code="above_limit", param=depth)
    elif isinstance(request, EmbeddingsRequest):
        check_texts(request.texts, limits, "input", limits.max_texts)
    elif isinstance(request, RerankRequest):
        check_texts([request.query], limits, "query", 1)
        check_texts(request.texts, limits, "documents", limits.max_documents)


def check_texts(texts: Sequence[str], limits: ServingSettings, param: str, max_texts: int) -> None:
    """Raises RequestError for no texts, too many of them, empty or too long ones."""
    if not texts:
        _refuse(f"`{param}` is empty.", code="invalid_value", param=param, status=422)
    if len(texts) > max_texts:
        raise above(param, max_texts)
    if any(not text.strip() for text in texts):
        _refuse(f"`{param}` holds an empty text.", code="invalid_value", param=param, status=422)
    if any(len(text) > limits.max_text_chars for text in texts):
        message = f"a text of `{param}` is longer than {limits.max_text_chars} characters."
        raise RequestError(413, message, code="text_too_long", param=param)


def above(param: str, limit: int) -> RequestError:
    """More was asked for than the server gives."""
    return RequestError(422, f"`{param}` may be or hold {limit} at the most.", code="above_limit", param=param)


def too_large(limits: ServingSettings) -> RequestError:
    """A body above the limit."""
    return RequestError(413, f"the body is larger than {limits.max_body_bytes} bytes.", code="body_too_large")


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A document that was found."""

    doc_id: str
    retrieval_score: float
    title: str | None = None
    text: str | None = None
    metadata: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of /v1/retrieve; what is not there is left out."""
        found = {"title": self.title, "text": self.text, "metadata": dict(self.metadata) if self.metadata else None}
        return {"id": self.doc_id, "score": self.retrieval_score} | {k: v for k, v in found.items() if v is not None}


def search_page(hits: Sequence[Sequence[Hit]], texts: Sequence[str], name: str, limit: int) -> dict[str, Any]:
    """Results in the form of OpenAI's vector stores: one list, the `limit` best of all queries' results."""
    best: dict[str, Hit] = {}
    for of_query in hits:
        for hit in of_query:
            if hit.doc_id not in best or hit.retrieval_score > best[hit.doc_id].retrieval_score:
                best[hit.doc_id] = hit
    data = [
        {
            "file_id": hit.doc_id,
            "filename": hit.title or hit.doc_id,
            "score": hit.retrieval_score,
            "attributes": _attributes(hit.metadata),
            "content": [{"type": "text", "text": hit.text or ""}],
        }
        for hit in sorted(best.values(), key=lambda hit: -hit.retrieval_score)[:limit]
    ]
    page = {"object": "vector_store.search_results.page", "search_query": list(texts), "data": data}
    return page | {"has_more": False, "next_page": None, "vector_store_id": name}


def _attributes(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """OpenAI's attributes are flat: words, numbers and truth values."""
    return {key: value for key, value in (metadata or {}).items() if isinstance(value, str | int | float | bool)}


def embedding(vector: Sequence[float], encoding_format: str) -> list[float] | str:
    """A vector as OpenAI writes it: a list, or the base64 of little-endian float32."""
    if encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
    return list(vector)


def to_json(value: Any) -> bytes:
    """An answer's bytes; ValueError for NaN and infinity, which cannot be written."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def to_json_in_steps(value: Any) -> bytes:
    """The same for a large answer in a thread: result by result, because one call of json.dumps stops all threads."""
    return b"".join(_steps(value, _RESULT_DEPTH))


_RESULT_DEPTH = 3
"""A result stands in the list of a query, in the list of all, in the answer."""


def _steps(value: Any, depth: int) -> Iterator[bytes]:
    if not depth or not value or not isinstance(value, dict | list):
        yield to_json(value)
        return
    members = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    start, end = (b"{", b"}") if isinstance(value, dict) else (b"[", b"]")
    for key, item in members:
        yield start + (to_json(key) + b":" if key is not None else b"")
        yield from _steps(item, depth - 1)
        start = b","
    yield end
