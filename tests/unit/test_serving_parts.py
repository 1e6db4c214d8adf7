"""Batches, and the change of snapshots, without HTTP or Ray."""

import asyncio
import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmr_ray.errors import DataError
from llmr_ray.index import collection, filters, snapshot
from llmr_ray.index.snapshot import OpenSnapshot
from llmr_ray.serving import engine, launch, switching
from llmr_ray.serving.batching import Batcher
from llmr_ray.serving.engine import LocalEncoder
from llmr_ray.serving.gate import Call
from llmr_ray.serving.metrics import merged
from llmr_ray.serving.settings import ServingSettings
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
    assert max(sizes) <= 8
    assert len(sizes) < 25


def test_much_work_of_one_caller_lets_others_in_between() -> None:
    """A document ranking of a quarter of a minute must not make time-outs of everybody's queries."""
    batches: list[list[str]] = []

    async def scenario() -> None:
        async def work(items: list[str]) -> list[str]:
            batches.append(items)
            await asyncio.sleep(0.001)
            return [item.upper() for item in items]

        batcher: Batcher[str, str] = Batcher(work, 10, len)
        long = asyncio.create_task(batcher.submit(["aaaa", "bbbbb"] * 20 + ["x" * 30]))
        late = []
        while len(late) < 5:
            await asyncio.sleep(0)
            if len(batches) == 3 * len(late) + 1:
                late.append((len(batches), asyncio.create_task(batcher.submit([f"q{len(late)}"]))))
        assert await long == ["AAAA", "BBBBB"] * 20 + ["X" * 30]
        for number, (begun, task) in enumerate(late):
            assert await task == [f"Q{number}"]
            assert f"q{number}" in batches[begun]  # the very next one

    asyncio.run(scenario())
    assert all(sum(map(len, batch)) <= 10 for batch in batches if batch != ["x" * 30])
    assert ["x" * 30] in batches
    assert len(batches) < 30


def test_who_leaves_ends_what_is_left_of_the_work() -> None:
    """A ranking that nobody waits for any more is work like any other to the processor."""
    done: list[int] = []

    async def scenario() -> None:
        async def work(items: list[int]) -> list[int]:
            await asyncio.sleep(0.001)
            done.extend(items)
            return items

        batcher: Batcher[int, int] = Batcher(work, 4)
        task = asyncio.create_task(batcher.submit(list(range(1000))))
        while len(done) < 8:
            await asyncio.sleep(0)
        task.cancel()
        assert await batcher.submit([-1]) == [-1]

    asyncio.run(scenario())
    assert len(done) <= 13


def test_an_error_in_a_slice_is_the_callers_alone() -> None:
    """Half an answer must not be taken for a whole one, and the neighbours of the bad slice have theirs."""

    async def scenario() -> None:
        async def work(items: list[int]) -> list[int]:
            await asyncio.sleep(0.001)
            if 13 in items:
                raise ValueError("thirteen")
            return items

        batcher: Batcher[int, int] = Batcher(work, 5)
        results = await asyncio.gather(
            batcher.submit(list(range(40))), *(batcher.submit([n]) for n in range(100, 130)), return_exceptions=True
        )
        assert isinstance(results[0], ValueError)
        assert results[1:] == [[n] for n in range(100, 130)]

    asyncio.run(scenario())


def test_queries_are_embedded_while_documents_are_ranked() -> None:
    """Both on one thread, every query waits for whoever ranks."""
    settings = ServingSettings(encode_batch_tokens=1000, batch_queries=10, reranker_max_tokens=100)
    go_on = threading.Event()
    embedded: list[int] = []
    ranked: list[int] = []

    def encode(prompted: Any) -> np.ndarray:
        embedded.append(len(prompted))
        return np.asarray([[len(text)] for text, _, _ in prompted], np.float32)

    def rank(pairs: Any) -> np.ndarray:
        assert go_on.wait(30)
        ranked.append(len(pairs))
        return np.asarray([len(document) for _, document in pairs], np.float32)

    async def scenario() -> None:
        encoder = LocalEncoder(encode, rank, settings)
        texts = ["d" * n for n in range(900, 1000)]
        ranking = asyncio.create_task(encoder.rank([("q", text) for text in texts]))
        short = await encoder.encode([(f"{'q' * n}", "i: ", 64) for n in range(35)])
        assert short[:, 0].tolist() == list(range(35))
        assert not ranking.done()
        embedded.clear()
        long = await encoder.encode([(text, "", 500) for text in texts])
        assert long[:, 0].tolist() == list(range(900, 1000))
        go_on.set()
        assert (await ranking).tolist() == list(range(900, 1000))

    asyncio.run(scenario())
    # Slices of about 1,000 tokens: documents of some 470 tokens each, pairs of 100.
    assert set(embedded) == {2}
    assert set(ranked) == {10}


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
    """An index built from the wrong file is whole and of the right encoder. A server that takes the place of a killed
    one must not serve what the others refuse."""
    service, first = docs.service(), docs.current
    docs.replace(seed=5)
    look(service)
    restarted = docs.service()
    for server in (service, restarted):
        assert "overlap by 0.00" in server.switcher.refused.reason
        assert asked(server)["index_snapshot"] == first
        assert f'llmr_index_snapshot_info{{snapshot="{first}"}} 1.0' in server.metrics_text()
        assert "llmr_index_current_refused 1.0" in server.metrics_text()
    forced = docs.service(docs.settings(canary_min_overlap=0.0))
    assert asked(forced)["index_snapshot"] == docs.current


def test_a_change_that_is_meant_is_accepted_once_for_all_servers(docs: World) -> None:
    """A setting of servers that lets one change pass lets the next one pass too, or is gone at the next start."""
    service = docs.service()
    second = docs.replace(seed=5)
    look(service)
    assert asked(service)["index_snapshot"] != second
    collection.accept(docs.root, "docs")
    look(service)  # at once, however long the next try is away
    assert asked(service)["index_snapshot"] == second
    assert asked(docs.service())["index_snapshot"] == second
    docs.replace(seed=6)
    look(service)
    assert "overlap by 0.00" in service.switcher.refused.reason
    assert asked(docs.service())["index_snapshot"] == second


def test_a_roll_back_needs_no_overlap(docs: World) -> None:
    """Who goes back from a spoiled snapshot must not be held there because the good one answers otherwise."""
    first = docs.current
    spoiled = docs.replace(seed=5)
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    assert asked(service)["index_snapshot"] == spoiled
    careful = docs.service()
    docs.rollback()
    look(service)
    look(careful)
    for server in (service, careful, docs.service()):
        assert asked(server)["index_snapshot"] == first
        assert server.switcher.refused is None
    collection.accept(docs.root, "docs")  # the other way, what is accepted is the older one
    docs.rollback()
    look(careful)
    assert docs.current == spoiled
    assert "overlap by 0.00" in careful.switcher.refused.reason


def test_without_a_snapshot_to_compare_with_the_current_one_is_served(docs: World, tmp_path: Path) -> None:
    """A new embedder wants new servers, which know nothing that was embedded before."""
    docs.replace(tiny_bert(tmp_path / "other", seed=9))
    service = docs.service()
    assert asked(service)["index_snapshot"] == docs.current
    assert service.switcher.refused is None


def test_what_was_refused_is_closed_and_not_opened_for_the_same_verdict(
    docs: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten refused snapshots must not hold ten indexes, nor be read again from end to end every few minutes."""
    monkeypatch.setattr(switching, "FIRST_WAIT_SECONDS", 0.0)
    service, first = docs.service(), docs.current
    group = service.engine.groups[0]
    refused, loaded = [], []
    load = group.load

    async def noting(snapshot_id: str, server: str) -> dict[str, Any]:
        loaded.append(snapshot_id)
        return await load(snapshot_id, server)

    group.load = noting
    for seed in (5, 6):
        refused.append(docs.replace(seed=seed))
        for _ in range(3):
            look(service)
        assert service.switcher.refused.attempts == 3
        assert "overlap by 0.00" in service.switcher.refused.reason
        assert set(group._open) == {first}
    assert loaded == [item for item in refused for _ in range(2)]  # for its vectors and for its texts
    spoil_shard(docs, docs.replace(seed=7))
    look(service)
    assert set(group._open) == {first}
    assert asked(service)["index_snapshot"] == first


def test_a_server_starts_on_the_snapshot_before_a_damaged_one(docs: World) -> None:
    """A process that is restarted while the newest snapshot is damaged must come up again."""
    first = docs.current
    bad = docs.add(40)
    spoil_shard(docs, bad)
    service = docs.service()
    assert asked(service)["index_snapshot"] == first
    assert service.switcher.refused.snapshot_id == bad
    assert "llmr_index_current_refused 1.0" in service.metrics_text()


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


def test_servers_that_disagree_do_not_close_each_others_snapshots(docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several servers over the same shard groups one may refuse what another, started later, serves: each try of
    the one had the other open its snapshot again within a request."""
    first, old = docs.current, docs.service(groups=2)
    groups = old.engine.groups
    docs.replace(seed=5)
    third = docs.add(20, seed=6)
    look(old)
    new = docs.service(shared=groups)
    assert (old.switcher.served.snapshot_id, new.switcher.served.snapshot_id) == (first, third)
    opened, open_one = [], engine.LocalShards._opened

    def noting(group: engine.LocalShards, snapshot_id: str) -> OpenSnapshot:
        opened.append(snapshot_id)
        return open_one(group, snapshot_id)

    monkeypatch.setattr(engine.LocalShards, "_opened", noting)
    for server in (old, new):
        asyncio.run(server.switcher.look(again=True))
        assert asked(old)["index_snapshot"] == first
        assert asked(new)["index_snapshot"] == third
    assert opened == []


def test_what_a_server_that_died_kept_is_closed(docs: World) -> None:
    """A snapshot that stays open for a process that is gone takes its memory for ever."""
    first, second = docs.current, docs.add(10)
    group = engine.LocalShards(docs.root, docs.settings(load_timeout_s=0.2))

    async def scenario() -> None:
        await group.load(first, "one")
        await group.load(second, "two")
        await group.keep([second], "two")
        assert set(group._open) == {first, second}
        await asyncio.sleep(0.5)
        await group.keep([second], "two")
        assert set(group._open) == {second}

    asyncio.run(scenario())


def test_a_group_that_starts_anew_is_told_what_to_keep(docs: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place of one that knew, and the next server to say what it serves would close all others'."""
    monkeypatch.setattr(switching, "KEEP_SECONDS", 0.0)
    service = docs.service(docs.settings(poll_seconds=0.01), groups=1)
    group = service.engine.groups[0]
    group._kept.clear()

    async def scenario() -> None:
        watching = asyncio.create_task(service.switcher.watch())
        while not group._kept:
            await asyncio.sleep(0.01)
        watching.cancel()
        await group.keep([], "another")

    asyncio.run(scenario())
    assert set(group._open) == {docs.current}


def test_metadata_is_read_before_a_snapshot_is_served_and_once_a_segment(
    docs: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first filter after a switch would stop every search until a million documents' metadata are parsed."""
    parsed = []
    parse = filters._of_metadata

    def noting(column: Any) -> Any:
        parsed.append(len(column))
        return parse(column)

    monkeypatch.setattr(filters, "_of_metadata", noting)
    service = docs.service(docs.settings(canary_min_overlap=0.0))
    assert sum(parsed) == 60
    parsed.clear()
    docs.add(40)
    look(service)
    assert sum(parsed) == 40  # the others are those of the snapshot before
    parsed.clear()
    chosen = {"type": "eq", "key": "lang", "value": "en"}
    hits = asked(service, top_k=100, filter=chosen)["results"][0]
    assert {hit["metadata"]["lang"] for hit in hits} == {"en"}
    assert len(hits) == 20 + 14
    assert parsed == []
    known = snapshot._LazyAttributes._known
    assert len([key for key in known if key[0].is_relative_to(docs.root)]) == 6
    del service, hits
    gc.collect()
    assert not [key for key in known if key[0].is_relative_to(docs.root)]


def test_a_failed_group_fails_the_request_or_is_told(docs: World) -> None:
    """A silently short list looks like a result."""
    whole = asked(docs.service(), top_k=60)["results"][0]
    for groups, allow in ((0, False), (3, False), (3, True)):
        settings = docs.settings(shard_groups=groups, allow_partial=allow)
        service = docs.service(settings, groups=groups)
        asked(service)
        assert "llmr_index_shards_missing 0.0" in service.metrics_text()

        async def broken(*_: Any) -> Any:
            raise DataError("gone")

        service.engine.groups[-1].search = broken
        if not allow:
            with pytest.raises(DataError, match="gone"):
                asked(service)
            assert "llmr_index_shards_missing 1.0" in service.metrics_text()
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
