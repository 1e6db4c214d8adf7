"""The way of an HTTP request into the server and out: key, limits, body, time, disconnects, errors, one line of log.

What the headers tell is refused before the body is read: a wrong host, key, type or length, a key above its rate, and
whoever comes to a full server. The body is counted as it arrives, and checked before it is worked on.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llmr_ray.errors import LlmrError
from llmr_ray.serving.admission import Admission, Visit
from llmr_ray.serving.keys import Key, KeyRing
from llmr_ray.serving.metrics import Metrics
from llmr_ray.serving.protocol import RequestError, to_json, to_json_in_steps, too_large
from llmr_ray.serving.settings import ServingSettings

ACCESS_LOG = "llmr_ray.serving.access"
"""The logger of one JSON line for each request."""

WATCH_AFTER_SECONDS = 0.05
"""Work shorter than this ends by itself; of longer work the client's leaving is noticed."""

LARGE_RESULTS = 256
"""An answer of more results is written in a thread, so that other requests go on meanwhile."""

_LOCAL_HOSTS = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

log = logging.getLogger(__name__)
access_log = logging.getLogger(ACCESS_LOG)


@dataclass(kw_only=True)
class Call:
    """A request on its way: whose it is, and what is told of it."""

    request_id: str
    route: str
    key: Key | None = None
    snapshot_id: str = ""
    num_results: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def key_name(self) -> str:
        """Whose limits count: of a key, or of all who have none."""
        return self.key.name if self.key else ""


Work = Callable[[Call, bytes], Awaitable[Any]]
"""A route's work on a body: what it returns is the answer's JSON."""


class Gate:
    """What all routes have in common.

    Args:
        settings: of the server.
        metrics: counts here.
        keys: who may ask; None: everybody, but from this machine's own pages alone if `only_local`.
        only_local: without keys, refuse requests for other host names: a page of the web whose name was pointed to
            127.0.0.1 (DNS rebinding) would read the collection through its visitor's browser.
    """

    def __init__(
        self, settings: ServingSettings, metrics: Metrics, keys: KeyRing | None = None, *, only_local: bool = False
    ) -> None:
        self.settings, self.metrics, self._keys = settings, metrics, keys
        self._only_local = only_local and keys is None
        self.admission = Admission(settings)

    async def answer(self, request: Request, route: str, scope: str | None, work: Work) -> Response:
        """Does a route's work on a request, or says why not.

        Args:
            request: the request.
            route: its name in logs and metrics.
            scope: that the key must have; None: no key is needed, and no limits apply.
            work: given the body, empty where the method has none.
        """
        started = time.perf_counter()
        call = Call(request_id=_request_id(request.headers.get("x-request-id")), route=route)
        headers: dict[str, str] = {}
        try:
            response = await self._answer(request, call, scope, work)
        except RequestError as error:
            response = _json_response(to_json(error.body(call.request_id)), error.status)
            if error.retry_after is not None:
                headers["retry-after"] = str(max(1, round(error.retry_after)))
            if error.status == 401:
                headers["www-authenticate"] = "Bearer"
            if error.status in (408, 413):
                headers["connection"] = "close"  # the rest of the body is not read
            call.told["error"] = error.code
        except ClientDisconnect:
            response = Response(status_code=499)
        seconds = time.perf_counter() - started
        self.metrics.requests.labels(route, str(response.status_code)).inc()
        if scope is not None:
            self.metrics.took("total", seconds)
        self._log(call, response.status_code, seconds)
        headers["x-request-id"] = call.request_id
        if call.snapshot_id:
            headers["x-index-snapshot"] = call.snapshot_id
        response.headers.update(headers)
        return response

    async def _answer(self, request: Request, call: Call, scope: str | None, work: Work) -> Response:
        if scope is None:
            return await self._guarded(call, work(call, b""))
        self._check_host(request)
        call.key = self._admit_key(request, scope)
        has_body = request.method == "POST"
        length = self._told_length(request) if has_body else 0
        async with self.admission.entered(call.key_name) as visit:
            visit.expect(length)
            body = await self._body(request, visit) if has_body else b""
            async with visit.turn() as waited:
                self.metrics.took("queue", waited)
                if waited > WATCH_AFTER_SECONDS and await request.is_disconnected():
                    raise ClientDisconnect  # of what waited through an overload, many have gone
                return await self._watched(request, call, work(call, body))

    async def _guarded(self, call: Call, work: Awaitable[Any]) -> Response:
        """The answer of the work; its errors as errors of a request, without anything that it said."""
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                result = await work
                if isinstance(result, Response):
                    return result
                if call.num_results > LARGE_RESULTS:
                    return _json_response(await asyncio.to_thread(to_json_in_steps, result))
                return _json_response(to_json(result))
        except (RequestError, asyncio.CancelledError):
            raise
        except TimeoutError:
            raise RequestError(
                504, "there was no answer in time.", code="timeout", retry_after=self.settings.request_timeout_s
            ) from None
        except LlmrError as error:
            log.error("request %s of %s: %s: %s", call.request_id, call.route, type(error).__name__, error)
            raise RequestError(503, "the index cannot be searched now.", code="unavailable", retry_after=5) from None
        except Exception as error:
            # Of a defect, only its place: its words may be those of a query.
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
            log.error("request %s of %s failed: %s at %s", call.request_id, call.route, type(error).__name__, where)
            raise RequestError(500, "the server failed.", code="internal_error") from None

    async def _watched(self, request: Request, call: Call, work: Awaitable[Any]) -> Response:
        """The work's answer; the work is cancelled when the client has gone."""
        task = asyncio.ensure_future(self._guarded(call, work))
        try:
            done, _ = await asyncio.wait({task}, timeout=WATCH_AFTER_SECONDS)
            if done:
                return task.result()
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
            if task.done():
                return task.result()
            raise ClientDisconnect
        finally:
            task.cancel()

    # --- before the work ---------------------------------------------------------------------------------------------

    def _check_host(self, request: Request) -> None:
        if self._only_local and not _LOCAL_HOSTS.fullmatch(request.headers.get("host", "")):
            raise RequestError(403, "this server answers requests for localhost alone.", code="wrong_host")

    def _admit_key(self, request: Request, scope: str) -> Key | None:
        if self._keys is None:
            return None
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        key = self._keys.find(secret.strip()) if kind.lower() == "bearer" and secret else None
        if key is None:
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        if not key.may(scope):
            raise RequestError(403, f"this key lacks the scope '{scope}'.", code="missing_scope")
        return key

    def _told_length(self, request: Request) -> int:
        """The body's length as its header tells it, 0 where there is none; refuses what cannot be read."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "the content type must be application/json.", code="unsupported_media_type")
        told = request.headers.get("content-length", "0")
        # Cut, because Python takes no number of thousands of digits.
        length = int(told[:20]) if told.isascii() and told.isdigit() else None
        if length is None or length > self.settings.max_body_bytes:
            raise too_large(self.settings)
        return length

    async def _body(self, request: Request, visit: Visit) -> bytes:
        """The body, read no further than is allowed and no longer than it may take."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self.settings.max_body_bytes:
                        raise too_large(self.settings)
                    visit.take(len(part))
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time.", code="body_timeout") from None
        return b"".join(parts)

    # --- after the work ----------------------------------------------------------------------------------------------

    def _log(self, call: Call, status: int, seconds: float) -> None:
        if not self.settings.access_log or call.route in ("healthz", "readyz"):
            return
        told: Mapping[str, Any] = {
            "time": round(time.time(), 3),
            "request_id": call.request_id,
            "route": call.route,
            "status": status,
            "ms": round(seconds * 1e3, 2),
            "key": call.key_name,
            "snapshot": call.snapshot_id,
            **call.told,
        }
        access_log.info(json.dumps(told, separators=(",", ":")))


def _json_response(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


def _request_id(given: str | None) -> str:
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
