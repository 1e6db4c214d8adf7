"""How a request becomes an answer: attempts, pauses and errors, without any input or output.

`exchange` is a generator that says what to do next, and is told what came of it; the clients in http.py do it, blocking
or not. So there is one set of rules for both.
"""

import json
import random
import secrets
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from llmr_ray.clients.errors import RequestRefusedError, ServerUnavailableError

BUSY = frozenset({429, 502, 503})
"""Statuses after which the same request may succeed. Not 504: its work was done and thrown away once already."""

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0
"""Pauses double from the first to the longest, where the server does not say how long to wait."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a client tries."""

    timeout_s: float = 30.0
    """Of one attempt, from its start to the last byte of the answer."""
    total_s: float = 120.0
    """Of a request with all its attempts and pauses. No pause begins that would end later."""
    max_retries: int = 5
    """Attempts after the first."""


@dataclass(frozen=True)
class Send:
    """Do this request within so many seconds, and send back a Reply or a Failure."""

    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Reply:
    """What the server answered; header names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Failure:
    """There was no answer. `reason` is for people."""

    reason: str
    timed_out: bool = False


T = TypeVar("T")
Exchange = Generator[Send | Pause, Reply | Failure | None, T]
"""What is to be done, step by step, and in the end what came of it."""


def exchange(
    url: str, method: str, path: str, body: Mapping[str, Any] | None, patience: Patience
) -> Exchange[dict[str, Any]]:
    """Asks until there is an answer; returns its JSON object.

    Args:
        url: of the server, for messages.
        method: of HTTP.
        path: of the route.
        body: the request's fields; None: no body.
        patience: how long.

    Raises:
        RequestRefusedError: the server will not answer this.
        ServerUnavailableError: no answer came in time.
    """
    request_id = secrets.token_hex(8)
    headers = {"x-request-id": request_id, "accept": "application/json"}
    content = None
    if body is not None:
        headers["content-type"] = "application/json"
        content = _bytes(body)
    started = time.monotonic()
    retried = 0
    while True:
        left = patience.total_s - (time.monotonic() - started)
        came = yield Send(method, path, content, headers, min(patience.timeout_s, max(left, 0.001)))
        if isinstance(came, Reply) and came.status == 200:
            return _object(url, came, request_id)
        error, wait = _judge(url, came, request_id)
        if wait is None:
            raise error
        # A little later than told, and not all clients at once.
        pause = (wait or min(FIRST_PAUSE_SECONDS * 2**retried, LONGEST_PAUSE_SECONDS)) * random.uniform(1.0, 1.2)
        left = patience.total_s - (time.monotonic() - started)
        if retried == patience.max_retries or pause >= left:
            raise error
        retried += 1
        yield Pause(pause)


def _bytes(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except ValueError as error:
        why = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else "NaN or infinity"
        message = f"the request holds {why}, which JSON cannot say. Take it out of the texts or the filter."
        raise RequestRefusedError(message, code="invalid_value") from error


def _judge(url: str, came: Reply | Failure | None, request_id: str) -> tuple[Exception, float | None]:
    """The error that this is, and the seconds after which to try again: 0 if the server did not say, None for never."""
    if not isinstance(came, Reply):
        failure = came or Failure("nothing came")
        advice = (
            "raise the client's time-out (timeout_s) or ask for less at once"
            if failure.timed_out
            else "is the address right, and the server started (llmr serve)?"
        )
        message = f"{url} does not answer ({failure.reason}): {advice} (request {request_id})"
        # One that timed out may still be worked on; asking again would add to the load.
        return ServerUnavailableError(message, request_id=request_id), None if failure.timed_out else 0.0
    told = _told(came)
    request_id = str(told.get("request_id") or request_id)
    said = str(told.get("message") or f"status {came.status} without an explanation")
    if came.status in BUSY or came.status >= 500:
        asked = _seconds(came.headers.get("retry-after"))
        advice = "try again later, or give the server more replicas" if came.status in BUSY else "see the server's log"
        message = f"{url} answered {came.status}: {said} {advice[0].upper()}{advice[1:]} (request {request_id})."
        error = ServerUnavailableError(message, came.status, asked, request_id)
        return error, (asked or 0.0) if came.status in BUSY else None
    if came.status == 404 and _NO_APPLICATION in came.body:
        message = (
            f"the proxy at {url} knows no application. One that has just started does not yet; if this lasts, see the "
            f"log of `llmr serve`, and whether the address has a path that the server lacks (request {request_id})."
        )
        return ServerUnavailableError(message, came.status, None, request_id), 0.0
    advice = _ADVICE.get(came.status, "")
    if not told and came.status in (301, 302, 307, 308, 404):
        advice = f"There is no llmr_ray server at {url}: check the address."
    message = f"{url} refused a request ({came.status}): {said} {advice}".rstrip() + f" (request {request_id})"
    param = told.get("param")
    return (
        RequestRefusedError(
            message, came.status, str(told.get("code") or ""), param if isinstance(param, str) else None, request_id
        ),
        None,
    )


_NO_APPLICATION = b"/-/routes for available routes"
"""In what Ray Serve's own proxies answer where no application has the path."""

_ADVICE = {
    401: "Give a key: Client(url, api_key=...) or the variable LLMR_API_KEY; `llmr keys add NAME` makes one.",
    403: "Use a key with the scope that is needed: `llmr keys add NAME --scope admin`.",
    413: "Send shorter texts, or fewer at once; info() tells the limits.",
}


def _told(reply: Reply) -> dict[str, Any]:
    """The error in the server's form; empty where something else answered, a proxy for example."""
    try:
        told = json.loads(reply.body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _object(url: str, reply: Reply, request_id: str) -> dict[str, Any]:
    try:
        value = json.loads(reply.body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise not_ours(url, request_id)
    return value


def not_ours(url: str, request_id: str = "") -> ServerUnavailableError:
    """What answers is no server of this kind, or one of another version."""
    return ServerUnavailableError(
        f"{url} answers, but not as a llmr_ray server of this version does. Check the address and compare the versions "
        f"(GET /info) (request {request_id or 'unknown'}).",
        200,
        request_id=request_id,
    )


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date (RFC 9110, 10.2.3); None where there is no sense in it."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return seconds if 0 <= seconds < float("inf") else None
