"""Batches, and the change of snapshots, without HTTP or Ray."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmr_ray.errors import DataError
from llmr_ray.index.snapshot import OpenSnapshot
from llmr_ray.serving import launch, switching
from llmr_ray.serving.batching import Batcher
from llmr_ray.serving.gate import Call
from llmr_ray.serving.metrics import merged
from tests.serving_world import World, world
from tests.tiny import tiny_bert

# --- batches ---------------------------------------------------------------------------------------------------------


def test_callers_get_their_own_results_in_as_few_batches_as_may_be() -> None:
    """Results that slip by one go to the wrong client; batches of one waste the machine."""
    sizes: list[int] = []

    async def scenario() -> None:
        async def work(items: list[int]) -> list[int]:
            sizes.append(len(items))
            await asyncio.sleep(0.01)
            return [item * 10 for item in items]

        batcher: Batcher[int, int] = Batcher(work, 8)
        asked = [list(range(n, n + n % 5 + 1)) for n in range(40)] + [list(range(30))]
        answers = await asyncio.gather(*(batcher.submit(items) for items in asked))
        assert answers == [[item * 10 for item in items] for items in asked]
        assert await batcher.submit([]) == []
        assert await batcher.submit([3]) == [30]

    asyncio.run(scenario())
    assert max(size for size in sizes if size != 30) <= 8
    assert 30 in sizes
    assert len(sizes) < 25


def test_one_callers_error_is_not_the_others() -> None:
    """One bad request among sixty must not fail them all."""

    async def scenario() -> None:
        async def work(items: list[int]) -> list[int]:
            await asyncio.sleep(0.001)
            if 13 in items:
                raise ValueError("thirteen")
            return items

        batcher: Batcher[int, int] = Batcher(work, 64)
        results = await asyncio.gather(*(batcher.submit([n]) for n in range(20)), return_exceptions=True)
        assert [type(result) for result in results].count(ValueError) == 1
        assert isinstance(results[13], ValueError)
        assert results[12] == [12]

    asyncio.run(scenario())


def test_who_leaves_before_the_work_costs_none() -> None:
    """Work for clients that gave up is what keeps an overloaded server overloaded."""
    done: list[int] = []

    async def scenario() -> None:
        async def work(items: list[int]) -> list[int]:
            await asyncio.sleep(0.02)
            done.extend(items)
            return items

        batcher: Batcher[int, int] = Batcher(work, 1)
        tasks = [asyncio.create_task(batcher.submit([n])) for n in range(6)]
        await asyncio.sleep(0.005)
        for task in tasks[1:5]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await batcher.submit([9]) == [9]

    asyncio.run(scenario())
    assert done == [0, 5, 9]


# --- switching -------------------------------------------------------------------------------------------------------


@pytest.fixture
def docs(tmp_path: Path) -> World:
    return world(tmp_path)


def asked(service: Any, **body: Any) -> dict[str, Any]:
    text = json.dumps({"query": "a b", "task": "qa"} | body).encode()
    return asyncio.run(service.retrieve(Call(request_id="r", route="retrieve"), text))


def look(service: Any) -> None:
    asyncio.run(service.switcher.look())


def test_a_new_snapshot_takes_over_and_a_rollback_takes_it_back(docs: World) -> None:
    """The answers after a switch must be those of a server that was started on the new snapshot."""
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    before = asked(service)
    first = docs.current
    second = docs.add(40)
    assert asked(service)["index_snapshot"] == first
    look(service)
    after = asked(service)
    assert after["index_snapshot"] == second
    fresh = asked(docs.service())
    assert after["results"] == fresh["results"]
    assert after["results"] != before["results"]
    assert 0 < service.switcher.served.canary_overlap < 1
    docs.rollback()
    look(service)
    again = asked(service)
    assert (again["index_snapshot"], again["results"]) == (first, before["results"])


def test_a_request_ends_with_the_snapshot_that_it_began_with(docs: World) -> None:
    """Rows of one snapshot read as those of another are real, wrong documents."""
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    expected = asked(service)
    engine = service.engine
    encode = engine.encoder.encode

    async def scenario() -> dict[str, Any]:
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def slow(prompted: Any) -> np.ndarray:
            reached.set()
            await go_on.wait()
            return await encode(prompted)

        engine.encoder.encode = slow
        body = b'{"query": "a b", "task": "qa"}'
        running = asyncio.create_task(service.retrieve(Call(request_id="r", route="retrieve"), body))
        await reached.wait()
        engine.encoder.encode = encode
        for seed in (1, 2, 3):  # the old one is closed meanwhile, and opened again
            docs.add(20, seed)
            await service.switcher.look()
        assert service.switcher.refused is None
        go_on.set()
        return await running

    answer = asyncio.run(scenario())
    assert (answer["index_snapshot"], answer["results"]) == (expected["index_snapshot"], expected["results"])
    assert asked(service)["index_snapshot"] == docs.current


def spoil_shard(docs: World, snapshot: str) -> None:
    manifest = json.loads((docs.collection / "snapshots" / snapshot / "manifest.json").read_text())
    path = next((docs.root / manifest["segments"][-1]["index"] / "files").glob("*.faiss"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def spoil_manifest(docs: World, snapshot: str) -> None:
    (docs.collection / "snapshots" / snapshot / "manifest.json").unlink()


def spoil_corpus(docs: World, snapshot: str) -> None:
    manifest = json.loads((docs.collection / "snapshots" / snapshot / "manifest.json").read_text())
    (docs.root / manifest["segments"][-1]["embeddings"] / "config.json").unlink()


@pytest.mark.parametrize("spoil", [spoil_shard, spoil_manifest, spoil_corpus])
def test_a_damaged_snapshot_leaves_the_old_one(docs: World, spoil: Any) -> None:
    """FAISS loads damaged files without a word; a server that switches to one answers with noise."""
    service = docs.service()
    first, expected = docs.current, asked(service)
    bad = docs.add(40)
    spoil(docs, bad)
    look(service)
    assert asked(service)["results"] == expected["results"]
    refused = service.switcher.refused
    assert (refused.snapshot_id, refused.attempts) == (bad, 1)
    ready = asyncio.run(service.readyz(Call(request_id="r", route="readyz"), b""))
    assert ready == {"status": "ready", "index_snapshot": first, "refused_snapshot": bad}
    info = asyncio.run(service.info(Call(request_id="r", route="info"), b""))
    assert info["refused_snapshot"]["reason"] == refused.reason
    text = service.metrics_text()
    assert "llmr_index_current_refused 1.0" in text
    look(service)  # not tried again at once
    assert service.switcher.refused.attempts == 1
    docs.rollback()
    look(service)
    assert service.switcher.refused is None
    assert "llmr_index_current_refused 0.0" in service.metrics_text()


def test_a_refused_snapshot_is_tried_again(docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that was away for a minute must not keep a server on old documents for ever."""
    monkeypatch.setattr(switching, "FIRST_WAIT_SECONDS", 0.0)
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    new = docs.add(40)
    path = docs.collection / "snapshots" / new / "manifest.json"
    path.rename(path.with_suffix(".away"))
    look(service)
    look(service)
    assert service.switcher.refused.attempts == 2
    path.with_suffix(".away").rename(path)
    look(service)
    assert asked(service)["index_snapshot"] == new


def test_another_encoder_is_refused(docs: World, tmp_path: Path) -> None:
    """Vectors of two models of one size compare without an error and mean nothing."""
    service = docs.service()
    first = docs.current
    docs.replace(tiny_bert(tmp_path / "other", seed=9))
    look(service)
    assert "another model" in service.switcher.refused.reason
    assert asked(service)["index_snapshot"] == first


def test_canaries_stop_what_finds_nothing_as_before(docs: World) -> None:
    """An index built from the wrong file is whole and of the right encoder."""
    service = docs.service()
    docs.replace(seed=5)
    look(service)
    assert "overlap by 0.00" in service.switcher.refused.reason
    assert asked(service)["index_snapshot"] != docs.current
    forced = docs.service(docs.settings(canary_min_overlap=0.0))
    assert asked(forced)["index_snapshot"] == docs.current


def test_a_server_starts_on_the_snapshot_before_a_damaged_one(docs: World) -> None:
    """A process that is restarted while the newest snapshot is damaged must come up again."""
    first = docs.current
    bad = docs.add(40)
    spoil_shard(docs, bad)
    service = docs.service()
    assert asked(service)["index_snapshot"] == first
    assert service.switcher.refused.snapshot_id == bad


def test_where_nothing_can_be_served_nothing_starts(docs: World) -> None:
    """A server that starts without an index looks healthy and answers nobody."""
    spoil_shard(docs, docs.current)
    with pytest.raises(DataError, match="no snapshot that can be served"):
        docs.service()


def test_weights_that_did_not_make_the_vectors_are_refused(docs: World, tmp_path: Path) -> None:
    """The wrong embedder answers every query, wrongly."""
    other = tiny_bert(tmp_path / "other", seed=3)
    with pytest.raises(DataError, match="another embedder"):
        docs.service(docs.settings(embedder=str(other)))


def test_old_snapshots_are_closed(docs: World) -> None:
    """Ten changes must not hold ten indexes."""
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    for seed in (1, 2, 3):
        docs.add(10, seed)
        look(service)
    assert service.switcher.refused is None
    assert set(service.engine.groups[0]._open) == {docs.current, OpenSnapshot(
        docs.root, "docs", docs.current, shards=()).manifest["parent"]}  # fmt: skip


def test_a_failed_group_fails_the_request_or_is_told(docs: World) -> None:
    """A silently short list looks like a result."""
    whole = asked(docs.service(), top_k=60)["results"][0]
    for allow in (False, True):
        settings = docs.settings(shard_groups=3, allow_partial=allow)
        service = docs.service(settings, groups=3)

        async def broken(*_: Any) -> Any:
            raise DataError("gone")

        service.engine.groups[1].search = broken
        if not allow:
            with pytest.raises(DataError, match="gone"):
                asked(service)
            continue
        answer = asked(service, top_k=60)
        assert answer["partial"] is True
        assert len(answer["results"][0]) == 40
        left = {hit["id"] for hit in answer["results"][0]}
        assert [hit["id"] for hit in answer["results"][0]] == [hit["id"] for hit in whole if hit["id"] in left]
        assert "llmr_index_shards_missing 1.0" in service.metrics_text()


# --- starting --------------------------------------------------------------------------------------------------------


def test_an_open_address_needs_keys(docs: World) -> None:
    """A default that listens to the world is found by the world within the hour."""
    from llmr_ray.errors import ConfigError

    settings = docs.settings()
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert launch.check_host(host, settings, open_to_all=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match="API keys"):
            launch.check_host(host, settings, open_to_all=False)
        assert not launch.check_host(host, settings, open_to_all=True)
        assert not launch.check_host(host, docs.settings(keys_file="k"), open_to_all=False)


def test_figures_of_several_processes_stay_apart() -> None:
    """A sum over replicas falls when one is replaced; Prometheus takes that for a restart of all."""
    one = '# HELP a_total A.\n# TYPE a_total counter\na_total{code="200"} 3.0\n# HELP b B.\n# TYPE b gauge\nb 1.0\n'
    page = merged({"x": one, "y": one.replace("3.0", "4.0")})
    assert page.splitlines() == [
        "# HELP a_total A.",
        "# TYPE a_total counter",
        'a_total{code="200",replica="x"} 3.0',
        'a_total{code="200",replica="y"} 4.0',
        "# HELP b B.",
        "# TYPE b gauge",
        'b{replica="x"} 1.0',
        'b{replica="y"} 1.0',
    ]
