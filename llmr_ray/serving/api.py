"""The HTTP interface: routes, what each needs, and what it answers. Any ASGI server runs it, app.py has Serve do so."""

import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llmr_ray.index.filters import All, Filter, FilterError, parse_filter
from llmr_ray.index.vectors import SIDES
from llmr_ray.serving import protocol
from llmr_ray.serving.engine import Engine, Retrieved
from llmr_ray.serving.gate import Call, Gate, Work
from llmr_ray.serving.metrics import CONTENT_TYPE
from llmr_ray.serving.models import EncoderSpec, Prompted
from llmr_ray.serving.protocol import RequestError, parse
from llmr_ray.serving.switching import Refused, Served, Switcher

Scrape = Callable[[], Awaitable[str]]


class Service:
    """What the routes do.

    Args:
        gate: through which every request goes.
        engine: searches.
        switcher: says which snapshot is served.
        spec: the tasks and their prompts.
        scrape: the metrics of all processes; None: of this one.
    """

    def __init__(
        self, gate: Gate, engine: Engine, switcher: Switcher, spec: EncoderSpec, scrape: Scrape | None = None
    ) -> None:
        self.gate, self.engine, self.switcher, self.spec = gate, engine, switcher, spec
        self.settings, self.metrics, self._scrape = gate.settings, gate.metrics, scrape
        self.name = self.settings.model or self.settings.collection
        self._started = int(time.time())

    # --- asking ------------------------------------------------------------------------------------------------------

    async def retrieve(self, call: Call, body: bytes) -> Any:
        """POST /v1/retrieve."""
        asked = parse(protocol.RetrieveRequest, body, self.settings)
        started = time.perf_counter()
        found = await self._retrieve(call, asked)
        told = {name: round(seconds * 1e3, 3) for name, seconds in found.seconds.items()}
        return {
            "results": [[hit.to_dict() for hit in hits] for hits in found.hits],
            "model": self.name,
            "index_snapshot": found.snapshot_id,
            "partial": found.partial,
            "usage": {"queries": len(asked.texts), "results": call.num_results},
            "timings_ms": told | {"total": round((time.perf_counter() - started) * 1e3, 3)},
            "request_id": call.request_id,
        }

    async def search(self, call: Call, body: bytes, name: str) -> Any:
        """POST /v1/vector_stores/{name}/search."""
        if name != self.settings.collection:
            raise RequestError(404, "there is no such vector store.", code="not_found")
        asked = parse(protocol.SearchRequest, body, self.settings).as_retrieval()
        found = await self._retrieve(call, asked)
        return protocol.search_page(found.hits, asked.texts, name, asked.top_k)

    async def _retrieve(self, call: Call, asked: protocol.RetrieveRequest) -> Retrieved:
        self._check_model(asked.model)
        served = self._served()
        call.snapshot_id = served.snapshot_id
        call.told |= {"queries": len(asked.texts), "chars": sum(map(len, asked.texts)), "top_k": asked.top_k}
        instruction, max_tokens = self.spec.prompt(self._task(asked.task), "query")
        prompted: list[Prompted] = [(text, instruction, max_tokens) for text in asked.texts]
        self.metrics.texts.labels("retrieve").inc(len(prompted))
        chosen = self._filter(call, asked.filter)
        try:
            found = await self.engine.retrieve(
                served.snapshot_id,
                prompted,
                min(asked.top_k, served.num_documents),
                chosen,
                with_text=asked.with_text,
                min_score=asked.min_score,
            )
        finally:
            self.metrics.missing.set(self.engine.groups_failed)
        call.num_results = sum(map(len, found.hits))
        for stage, seconds in found.seconds.items():
            self.metrics.took(stage, seconds)
        return found

    async def embeddings(self, call: Call, body: bytes) -> Any:
        """POST /v1/embeddings, as OpenAI's. `usage` is an estimate from the texts' lengths, four characters a token."""
        asked = parse(protocol.EmbeddingsRequest, body, self.settings)
        prompt = self._models().get(asked.model)
        if prompt is None:
            raise RequestError(404, "there is no such model; see /v1/models.", code="model_not_found", param="model")
        task, side = prompt
        if asked.task is not None:
            task, side = self._task(asked.task), asked.input_type
        elif task is None:
            task, side = self.settings.default_task or None, asked.input_type
        instruction, max_tokens = self.spec.prompt(task, side)
        call.told |= {"texts": len(asked.texts), "chars": sum(map(len, asked.texts))}
        self.metrics.texts.labels("embeddings").inc(len(asked.texts))
        started = time.perf_counter()
        vectors = await self.engine.encoder.encode([(text, instruction, max_tokens) for text in asked.texts])
        self.metrics.took("encode", time.perf_counter() - started)
        if asked.dimensions not in (None, vectors.shape[1]):
            message = f"this model's embeddings have {vectors.shape[1]} values."
            raise RequestError(422, message, code="invalid_value", param="dimensions")
        rows = [
            {"object": "embedding", "index": at, "embedding": protocol.embedding(vector, asked.encoding_format)}
            for at, vector in enumerate(vectors.tolist())
        ]
        # OpenAI's rule of four characters to a token: the encoder tells no counts, and counting would tokenise twice.
        tokens = sum(len(text) // 4 + 1 for text in asked.texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": rows, "model": asked.model, "usage": usage}

    async def rerank(self, call: Call, body: bytes) -> Any:
        """POST /v1/rerank: documents by a cross-encoder, best first."""
        asked = parse(protocol.RerankRequest, body, self.settings)
        if not self.settings.reranker:
            raise RequestError(404, "this server has no model to rank with (serving.reranker).", code="model_not_found")
        if asked.model not in (None, self._reranker):
            raise RequestError(404, "there is no such model; see /v1/models.", code="model_not_found", param="model")
        call.told |= {"documents": len(asked.documents), "chars": sum(map(len, asked.texts))}
        self.metrics.texts.labels("rerank").inc(len(asked.documents))
        started = time.perf_counter()
        logits = await self.engine.encoder.rank([(asked.query, text) for text in asked.texts])
        self.metrics.took("rerank", time.perf_counter() - started)
        order = np.argsort(-logits, kind="stable")[: asked.top_n]
        shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
        results = [
            {"index": int(at), "relevance_score": float(shares[at])}
            | ({"document": {"text": asked.texts[at]}} if asked.return_documents else {})
            for at in order
        ]
        usage = {"documents": len(asked.documents)}
        return {"results": results, "model": self._reranker, "usage": usage, "request_id": call.request_id}

    # --- telling -----------------------------------------------------------------------------------------------------

    async def models(self, call: Call, body: bytes) -> Any:
        """GET /v1/models: the plain embedder, one name for each task and side, and the reranker."""
        names = [*self._models(), *([self._reranker] if self.settings.reranker else [])]
        data = [{"id": name, "object": "model", "created": self._started, "owned_by": "llmr_ray"} for name in names]
        return {"object": "list", "data": data}

    async def info(self, call: Call, body: bytes) -> Any:
        """GET /info: what is served and within which limits."""
        settings, served, refused = self.settings, self.switcher.served, self.switcher.refused
        limits = (
            "max_body_bytes", "max_text_chars", "max_texts", "max_documents", "max_top_k", "max_results",
            "request_timeout_s",
        )  # fmt: skip
        return {
            "model": self.name,
            "collection": settings.collection,
            "encoder": self.spec.encoder,
            "tasks": sorted(self.spec.prompts),
            "default_task": self._default_task,
            "reranker": self._reranker if settings.reranker else None,
            "version": version("llmr_ray"),
            "index_snapshot": served.snapshot_id if served else None,
            "num_documents": served.num_documents if served else 0,
            "dimension": served.dimension if served else None,
            "canary_overlap": served.canary_overlap if served else None,
            "refused_snapshot": _refusal(refused, call) if refused else None,
            "limits": {name: getattr(settings, name) for name in limits},
            "partial_answers": settings.allow_partial,
        }

    async def healthz(self, call: Call, body: bytes) -> Any:
        """GET /healthz: the process lives."""
        return {"status": "ok"}

    async def readyz(self, call: Call, body: bytes) -> Any:
        """GET /readyz: a snapshot is served; whether a newer one was refused is told too."""
        served, refused = self._served(), self.switcher.refused
        call.snapshot_id = served.snapshot_id
        told = {"refused_snapshot": refused.snapshot_id} if refused else {}
        return {"status": "ready", "index_snapshot": served.snapshot_id} | told

    async def scrape(self, call: Call, body: bytes) -> Any:
        """GET /metrics, in Prometheus' text form."""
        text = await self._scrape() if self._scrape else self.metrics_text()
        return Response(text, media_type=CONTENT_TYPE)

    def metrics_text(self) -> str:
        """The metrics of this process, as they are now."""
        self.metrics.working.set(self.gate.admission.working)
        self.metrics.waiting.set(self.gate.admission.waiting)
        return self.metrics.text()

    async def reload(self, call: Call, body: bytes) -> Any:
        """POST /admin/reload: looks for the current snapshot at once, also for one that was refused."""
        await self.switcher.look(again=True)
        refused = self.switcher.refused
        if refused is not None:
            raise RequestError(409, "the current snapshot cannot be served; see /info.", code="snapshot_refused")
        call.snapshot_id = self._served().snapshot_id
        return {"index_snapshot": call.snapshot_id}

    # --- what a request may name -------------------------------------------------------------------------------------

    def _served(self) -> Served:
        if self.switcher.served is None:
            raise RequestError(503, "no snapshot is served yet.", code="not_ready", retry_after=5)
        return self.switcher.served

    @property
    def _default_task(self) -> str | None:
        only = list(self.spec.prompts)
        return self.settings.default_task or (only[0] if len(only) == 1 else None)

    def _task(self, task: str | None) -> str:
        chosen = task if task is not None else self._default_task
        if chosen is None or chosen not in self.spec.prompts:
            known = ", ".join(sorted(self.spec.prompts))
            raise RequestError(422, f"`task` must be one of: {known}.", code="unknown_task", param="task")
        return chosen

    def _models(self) -> dict[str, tuple[str | None, str]]:
        """Names of the embedder: plain, and with a task's instruction for queries or documents."""
        names: dict[str, tuple[str | None, str]] = {self.name: (None, "query")}
        for task in sorted(self.spec.prompts):
            names |= {f"{self.name}/{task}-{side}": (task, side) for side in SIDES}
        return names

    @property
    def _reranker(self) -> str:
        return f"{self.name}/rerank"

    def _check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            raise RequestError(404, "there is no such model; see /v1/models.", code="model_not_found", param="model")

    def _filter(self, call: Call, given: dict[str, Any] | None) -> Filter | None:
        """What the request asks for and what its key is bound to."""
        bound = call.key.filter if call.key else None
        try:
            filters = [parse_filter(value) for value in (given, bound) if value is not None]
        except FilterError as error:
            raise RequestError(422, f"`filter`: {error}", code="invalid_filter", param="filter") from None
        return All(tuple(filters)) if len(filters) > 1 else (filters[0] if filters else None)


def _refusal(refused: Refused, call: Call) -> dict[str, Any]:
    """What is wrong with the current snapshot; the reason names files, which is the operators' business."""
    told = {"id": refused.snapshot_id, "attempts": refused.attempts}
    is_operator = call.key is None or call.key.may("admin")
    return told | ({"reason": refused.reason} if is_operator else {})


def build_api(service: Service) -> FastAPI:
    """The application of a service.

    FastAPI's own pages are off: they load scripts from elsewhere. So are its redirects to a path without its last
    slash: they repeat the Host and the query string of whoever asks, without a key.
    """
    api = FastAPI(
        title="llmr_ray",
        version=version("llmr_ray"),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    gate = service.gate

    def route(method: str, path: str, name: str, scope: str | None, work: Work, kind: Any = None) -> None:
        async def endpoint(request: Request) -> Response:
            return await gate.answer(request, name, scope, work)

        api.add_api_route(path, endpoint, methods=[method], name=name, openapi_extra=_extra(kind, work, scope))

    async def search(request: Request) -> Response:
        name = request.path_params["vector_store_id"]
        return await gate.answer(request, "search", "read", lambda call, body: service.search(call, body, name))

    async def openapi(call: Call, body: bytes) -> Any:
        return _openapi(api)

    page, policy = _page()

    async def index(call: Call, body: bytes) -> Any:
        return Response(page, headers={"content-security-policy": policy}, media_type="text/html; charset=utf-8")

    route("POST", "/v1/retrieve", "retrieve", "read", service.retrieve, protocol.RetrieveRequest)
    route("POST", "/v1/embeddings", "embeddings", "read", service.embeddings, protocol.EmbeddingsRequest)
    route("POST", "/v1/rerank", "rerank", "read", service.rerank, protocol.RerankRequest)
    path = "/v1/vector_stores/{vector_store_id}/search"
    api.add_api_route(
        path, search, methods=["POST"], openapi_extra=_extra(protocol.SearchRequest, service.search, "read", True)
    )
    route("GET", "/v1/models", "models", "read", service.models)
    route("GET", "/info", "info", "read", service.info)
    route("GET", "/metrics", "metrics", "admin", service.scrape)
    route("POST", "/admin/reload", "reload", "admin", service.reload)
    route("GET", "/openapi.json", "openapi", "read", openapi)
    route("GET", "/healthz", "healthz", None, service.healthz)
    route("GET", "/readyz", "readyz", None, service.readyz)
    route("GET", "/", "page", None, index)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        async def fail(call: Call, body: bytes) -> Any:
            message, code = _UNKNOWN.get(error.status_code, ("refused.", "refused"))
            raise RequestError(error.status_code, message, code=code)

        response = await gate.answer(request, "unknown", None, fail)
        response.headers.update(error.headers or {})  # Allow, of 405
        return response

    return api


_UNKNOWN = {
    404: ("there is no such route.", "not_found"),
    405: ("this route has another method.", "method_not_allowed"),
}


def _extra(kind: Any, work: Callable[..., Any], scope: str | None, in_path: bool = False) -> dict[str, Any]:
    """What the OpenAPI document says of a route beyond its path."""
    extra: dict[str, Any] = {"description": (work.__doc__ or "").strip(), "x-scope": scope}
    if scope is not None:
        extra["security"] = [{"key": []}]
    if kind is not None:
        reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    if in_path:
        place = {"name": "vector_store_id", "in": "path", "required": True, "schema": {"type": "string"}}
        extra["parameters"] = [place]
    return extra


def _openapi(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        document = get_openapi(title=api.title, version=api.version, routes=api.routes)
        schemas: dict[str, Any] = {}
        kinds = (
            protocol.RetrieveRequest, protocol.SearchRequest, protocol.EmbeddingsRequest, protocol.RerankRequest
        )  # fmt: skip
        for kind in kinds:
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}
        key = {"type": "http", "scheme": "bearer"}
        document["components"] = {"schemas": schemas, "securitySchemes": {"key": key}}
        api.openapi_schema = document
    return api.openapi_schema


def _page() -> tuple[str, str]:
    """The page for people, and the policy that lets nothing run but what stands in it."""
    text = files("llmr_ray.serving").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("script", "style"):
        [inner] = re.findall(f"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy
