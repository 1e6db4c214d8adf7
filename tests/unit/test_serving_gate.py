"""The gate, asked as an ASGI server does: what it reads of a request, and how it writes what comes of it."""

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from llmr_ray.serving.gate import LARGE_RESULTS, Call, Gate
from llmr_ray.serving.keys import KeyRing, add_key
from llmr_ray.serving.metrics import Metrics
from llmr_ray.serving.settings import ServingSettings


class Sent:
    """A request whose body comes in parts, and how many of them were asked for; after the last it stalls."""

    def __init__(self, *parts: bytes, whole: bool = True, **headers: str) -> None:
        self._parts, self._whole, self.num_read = list(parts), whole, 0
        given = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        self.request = Request(scope, self._receive)

    async def _receive(self) -> dict[str, Any]:
        self.num_read += 1
        if self.num_read > len(self._parts):
            await asyncio.Event().wait()
        more = not self._whole or self.num_read < len(self._parts)
        return {"type": "http.request", "body": self._parts[self.num_read - 1], "more_body": more}


async def length(call: Call, body: bytes) -> Any:
    return {"length": len(body)}


def gate(keys: KeyRing | None = None, **settings: Any) -> Gate:
    return Gate(ServingSettings(access_log=False, **settings), Metrics(), keys)


async def asked(gate: Gate, sent: Sent, work: Any = length) -> tuple[int, dict[str, Any]]:
    answer: Response = await gate.answer(sent.request, "retrieve", "read", work)
    return answer.status_code, json.loads(answer.body)


def test_what_the_headers_tell_is_refused_without_reading_the_body(tmp_path: Path) -> None:
    """Bodies that are read before they are refused fill the memory of a server that is already too busy."""
    path = tmp_path / "keys.json"
    key = add_key(path, "app", ("read",))
    add_key(path, "other", ("read",))
    bearer = {"authorization": f"Bearer {key}"}

    async def refused(gate: Gate, status: int, code: str, **headers: str) -> None:
        sent = Sent(b"{}", **headers)
        got, told = await asked(gate, sent)
        assert (got, told["error"]["code"], sent.num_read) == (status, code, 0)

    async def scenario() -> None:
        ring = KeyRing(path)
        await refused(gate(ring), 401, "invalid_api_key")
        await refused(gate(ring), 413, "body_too_large", content_length="9999999", **bearer)
        full = gate(max_concurrent=1, max_queued=0)
        async with full.admission.entered("somebody"):
            await refused(full, 429, "overloaded")
        often = gate(ring, requests_per_second_per_key=0.5)
        assert (await asked(often, Sent(b"{}", **bearer)))[0] == 200
        await refused(often, 429, "rate_limited", **bearer)
        many = gate(ring, max_concurrent_per_key=1)
        async with many.admission.entered("app"):
            await refused(many, 429, "too_many_requests", **bearer)
        heavy = gate(max_queued_mb=1)
        async with heavy.admission.entered("somebody") as visit:
            visit.take(2**19)
            await refused(heavy, 429, "overloaded", content_length=str(2**19 + 1))
        assert await asked(heavy, Sent(b"ab", b"c", content_length="3")) == (200, {"length": 3})
        for told, status in (("0" * 5_000, 200), ("9" * 5_000, 413), ("-1", 413), ("x", 413)):
            assert (await asked(heavy, Sent(b"{}", content_length=told)))[0] == status

    asyncio.run(scenario())


def test_bodies_that_arrive_are_bounded_together() -> None:
    """Without Content-Length nothing is known before the bytes are there."""

    async def scenario() -> None:
        small = gate(max_queued_mb=1, body_timeout_s=0.2)
        slow, late = Sent(b"x" * 700_000, whole=False), Sent(*[b"x" * 100_000] * 9)
        first = asyncio.create_task(asked(small, slow))
        await asyncio.sleep(0.02)
        status, told = await asked(small, late)
        assert (status, told["error"]["code"], late.num_read) == (429, "overloaded", 4)
        assert (await first)[0] == 408
        assert (await asked(small, Sent(*[b"x" * 100_000] * 9)))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [1, LARGE_RESULTS + 1])
def test_an_answer_that_cannot_be_written_is_a_failure_like_others(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A NaN in a document's metadata gave a bare 500 that no log and no metric knew of."""

    async def work(call: Call, body: bytes) -> Any:
        call.num_results = number
        return {"results": [[{"metadata": {"zanzibar": float("nan")}}] * number]}

    watched = gate()
    status, told = asyncio.run(asked(watched, Sent(b"{}"), work))
    assert (status, told["error"]["code"], told["error"]["type"]) == (500, "internal_error", "server_error")
    assert told["error"]["request_id"] in caplog.text
    assert "ValueError" in caplog.text
    assert "zanzibar" not in caplog.text
    assert 'llmr_retrieve_requests_total{code="500",route="retrieve"} 1.0' in watched.metrics.text()


def test_a_large_answer_lets_others_go_on() -> None:
    """While one client's answer of megabytes was written, nobody else was answered."""
    hit = {"id": "d", "score": 0.5, "text": "word " * 4_000}

    async def large(call: Call, body: bytes) -> Any:
        call.num_results = 3_000
        return {"results": [[hit] * 1_000] * 3}

    async def scenario() -> tuple[Sequence[Any], int]:
        done, beats = asyncio.Event(), 0

        async def beat() -> None:
            nonlocal beats
            while not done.is_set():
                await asyncio.sleep(0.001)
                beats += 1

        beating = asyncio.create_task(beat())
        answer = await gate().answer(Sent(b"{}").request, "retrieve", "read", large)
        done.set()
        await beating
        return json.loads(answer.body)["results"], beats

    results, beats = asyncio.run(scenario())
    assert results == [[hit] * 1_000] * 3
    assert beats >= 5


def test_a_cleared_refusal_is_no_switch(caplog: pytest.LogCaptureFixture) -> None:
    """A count of switches that moves when nothing was switched sends people to look for a new index."""
    caplog.set_level(logging.ERROR)
    from types import SimpleNamespace as Told

    metrics = Metrics()
    first = Told(snapshot_id="a", created="2026-01-01T00:00:00Z", num_documents=1, canary_overlap=None)
    second = Told(**vars(first) | {"snapshot_id": "b"})

    def count(outcome: str) -> float:
        return metrics.switches.labels(outcome)._value.get()

    seen = []
    once, again = Told(), Told()
    for served, refused in ((first, None), (first, once), (first, again), (first, None), (second, None), (first, None)):
        metrics.watch(Told(served=served, refused=refused))  # type: ignore[arg-type]
        seen.append((count("switched"), count("refused")))
    assert seen == [(1, 0), (1, 1), (1, 2), (1, 2), (2, 2), (3, 2)]
    # A server that starts on the snapshot before one that it refuses.
    metrics = Metrics()
    for served in (None, first):
        metrics.watch(Told(served=served, refused=once))  # type: ignore[arg-type]
    assert (count("switched"), count("refused")) == (1, 1)
    assert metrics.refused_snapshot._value.get() == 1
