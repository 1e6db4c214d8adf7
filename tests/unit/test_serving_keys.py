"""API keys and who may come in."""

import asyncio
import json
import stat
import time
from pathlib import Path

import pytest

from llmr_ray.errors import ConfigError
from llmr_ray.serving import keys as keys_module
from llmr_ray.serving.admission import Admission
from llmr_ray.serving.keys import Key, KeyRing, add_key, digest, read_keys, revoke_key
from llmr_ray.serving.protocol import RequestError
from llmr_ray.serving.settings import ServingSettings


def test_the_file_holds_no_key_and_nobody_else_reads_it(tmp_path: Path) -> None:
    """A backup of the file, or another user of the machine, must not get in."""
    path = tmp_path / "keys.json"
    secret = add_key(path, "app", ("read",))
    assert secret.startswith("llmr_")
    assert secret not in path.read_text()
    assert secret.removeprefix("llmr_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["keys"][0]["sha256"] == digest(secret)


def test_keys_are_found_and_others_are_not(tmp_path: Path) -> None:
    """A prefix, another case, an empty key or a hash is no key."""
    path = tmp_path / "keys.json"
    secrets = {name: add_key(path, name, scopes) for name, scopes in (("a", ("read",)), ("b", ("read", "admin")))}
    ring = KeyRing(path)
    for name, secret in secrets.items():
        assert ring.find(secret).name == name
        for wrong in (secret[:-1], secret + "x", secret.upper(), "", digest(secret), "\udcff"):
            assert ring.find(wrong) is None


def test_rotation_needs_no_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leaked key that lives until the next restart is a leak for days."""
    monkeypatch.setattr(keys_module, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    old = add_key(path, "old", ("read",))
    ring = KeyRing(path)
    new = add_key(path, "new", ("read",))
    assert ring.find(new).name == "new"
    revoke_key(path, "old")
    assert ring.find(old) is None
    assert [key.name for key in read_keys(path)] == ["new"]


@pytest.mark.parametrize("content", ["{", '{"keys": 1}', '{"keys": [{"name": "x"}]}', None, '{"keys": [[]]}'])
def test_a_spoiled_file_lets_the_last_keys_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """A half-written file must neither lock everybody out nor let anybody in."""
    monkeypatch.setattr(keys_module, "LOOK_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    secret = add_key(path, "app", ("read",))
    ring = KeyRing(path)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert ring.find(secret).name == "app"
    assert ring.find("other") is None
    assert ring.failures == 1


def test_mistakes_are_told(tmp_path: Path) -> None:
    """Two keys of one name cannot be revoked apart; a server whose file is missing must not start open."""
    path = tmp_path / "keys.json"
    add_key(path, "app", ("read",))
    for call in (
        lambda: add_key(path, "app", ("read",)),
        lambda: add_key(path, "", ("read",)),
        lambda: add_key(path, "x", ("write",)),
        lambda: revoke_key(path, "nobody"),
        lambda: KeyRing(tmp_path / "missing.json"),
    ):
        with pytest.raises(ConfigError):
            call()


def test_an_admin_may_read() -> None:
    """Operators are told to look at /info with their admin key; a reader is no operator."""
    reader, admin = (Key(name="k", scopes=(scope,), sha256="") for scope in ("read", "admin"))
    assert [reader.may("read"), reader.may("admin")] == [True, False]
    assert [admin.may("read"), admin.may("admin")] == [True, True]


# --- admission -------------------------------------------------------------------------------------------------------


def admission(**changes: float) -> Admission:
    return Admission(ServingSettings().changed(changes))


async def held(gate: Admission, key: str, until: asyncio.Event, num_bytes: int = 0) -> float:
    async with gate.entered(key) as visit:
        visit.take(num_bytes)
        async with visit.turn() as waited:
            await until.wait()
            return waited


def test_work_and_queue_are_bounded() -> None:
    """Without a bound an overloaded server answers nobody in time."""

    async def scenario() -> None:
        gate, done = admission(max_concurrent=2, max_queued=3), asyncio.Event()
        tasks = [asyncio.create_task(held(gate, "k", done)) for _ in range(5)]
        await asyncio.sleep(0.01)
        assert (gate.working, gate.waiting) == (2, 3)
        with pytest.raises(RequestError) as caught:
            async with gate.entered("other"):
                pass
        assert caught.value.status == 429
        assert 1 <= caught.value.retry_after <= 30
        done.set()
        await asyncio.gather(*tasks)
        assert (gate.working, gate.waiting) == (0, 0)
        async with gate.entered("k") as visit, visit.turn():
            assert gate.working == 1

    asyncio.run(scenario())


def test_waiting_is_bounded_in_time_and_bytes() -> None:
    """A queue of any length is refused what it cannot serve in time, and large bodies may not fill the memory."""

    async def scenario() -> None:
        gate, done = admission(max_concurrent=1, max_queued_mb=1, queue_timeout_s=0.05), asyncio.Event()
        working = asyncio.create_task(held(gate, "k", done))
        await asyncio.sleep(0.01)
        started = time.perf_counter()
        with pytest.raises(RequestError, match="busy"):
            await held(gate, "k", done)
        assert time.perf_counter() - started >= 0.04
        assert (gate.working, gate.waiting) == (1, 0)

        two = [asyncio.create_task(held(gate, "k", done, 2**19)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="busy"):
            await held(gate, "k", done, 1)
        assert all(isinstance(error, RequestError) for error in await asyncio.gather(*two, return_exceptions=True))
        again = [asyncio.create_task(held(gate, "k", done, 2**19)) for _ in range(2)]
        await asyncio.sleep(0)
        done.set()
        await asyncio.gather(working, *again)

    asyncio.run(scenario())


def test_bodies_that_arrive_count_until_they_are_worked_on() -> None:
    """A thousand uploads at once fill the memory before one of them waits; work must not block those that come."""

    async def scenario() -> None:
        gate = admission(max_queued_mb=1)
        async with gate.entered("a") as first, gate.entered("b") as second:
            first.take(700_000)
            with pytest.raises(RequestError, match="busy") as caught:
                second.expect(400_000)
            assert caught.value.status == 429
            second.take(300_000)
            with pytest.raises(RequestError, match="busy"):
                first.take(100_000)
            async with first.turn():
                second.take(700_000)
        async with gate.entered("c") as alone:
            alone.take(3 * 2**20)  # else a bound below max_body_bytes would let no large body in, ever
            async with gate.entered("d") as other:
                with pytest.raises(RequestError, match="busy"):
                    other.take(1)
        async with gate.entered("e") as one, gate.entered("f") as two:
            one.take(2**19)
            two.take(2**19)  # nothing of those that left is counted

    asyncio.run(scenario())


def test_who_sends_takes_a_place() -> None:
    """Else clients that send slowly are as many as like to."""

    async def scenario() -> None:
        gate = admission(max_concurrent=1, max_queued=1)
        async with gate.entered("a"), gate.entered("b"):
            with pytest.raises(RequestError, match="busy"):
                async with gate.entered("c"):
                    pass
        async with gate.entered("c"):
            pass

    asyncio.run(scenario())


def test_who_gives_up_waiting_leaves_no_trace() -> None:
    """Places in the queue that are never given back make the server refuse everybody in the end."""

    async def scenario() -> None:
        gate, done = admission(max_concurrent=1, max_queued=5, max_concurrent_per_key=3), asyncio.Event()
        working = asyncio.create_task(held(gate, "k", done))
        await asyncio.sleep(0.01)
        for _ in range(20):
            waiting = asyncio.create_task(held(gate, "k", done))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert (gate.working, gate.waiting) == (1, 0)
        done.set()
        await working

    asyncio.run(scenario())


def test_one_key_cannot_take_all() -> None:
    """A client that floods must meet its own limit before the others meet the server's."""

    async def scenario() -> None:
        gate, done = admission(max_concurrent=8, max_concurrent_per_key=2), asyncio.Event()
        tasks = [asyncio.create_task(held(gate, "flood", done)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="under way"):
            async with gate.entered("flood"):
                pass
        async with gate.entered("other"):
            pass
        done.set()
        await asyncio.gather(*tasks)
        async with gate.entered("flood"):
            pass

    asyncio.run(scenario())


def test_a_keys_rate_is_limited() -> None:
    """The bucket lets a burst through, then the rate."""

    async def scenario() -> None:
        gate = admission(requests_per_second_per_key=50.0)
        passed = refused = 0
        for _ in range(150):
            try:
                async with gate.entered("k"):
                    passed += 1
            except RequestError:
                refused += 1
        assert passed >= 100
        assert refused > 20
        await asyncio.sleep(0.1)
        async with gate.entered("k"):
            pass

    asyncio.run(scenario())
