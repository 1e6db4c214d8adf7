"""Collections and snapshots against brute force: added, deleted, replaced, filtered, damaged, half written."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llmr_ray import durable
from llmr_ray.errors import DataError
from llmr_ray.index import collection, index_cli
from llmr_ray.index import snapshot as snapshots_module
from llmr_ray.index.filters import Comparison, Not
from llmr_ray.index.snapshot import Named, OpenSnapshot, current, folder_of, named
from llmr_ray.index.topk import MISSING, exact_topk, select_topk
from tests.collections_world import document, indexed, unit

DIMENSION = 16


class Expected:
    """What a collection should hold, kept as plain lists: (doc_id, vector, metadata), rows in the order of adding."""

    def __init__(self):
        self.rows = []

    def add(self, doc_ids, vectors, metas=None):
        for number, (doc_id, vector) in enumerate(zip(doc_ids, vectors, strict=True)):
            self.delete([doc_id])
            self.rows.append((doc_id, vector, (metas or [None] * len(doc_ids))[number]))

    def delete(self, doc_ids):
        self.rows = [row if row is None or row[0] not in doc_ids else None for row in self.rows]

    def search(self, queries, k, holds=lambda row: True):
        live = [number for number, row in enumerate(self.rows) if row is not None and holds(row)]
        if not live:
            return np.full((len(queries), k), MISSING), np.full((len(queries), k), -np.inf, np.float32)
        vectors = np.stack([self.rows[number][1] for number in live])
        found, scores = exact_topk(queries, vectors, np.tile([[0, len(live)]], (len(queries), 1)), k)
        return np.where(found == MISSING, MISSING, np.asarray(live)[found]), scores


def opened(root, **options):
    return OpenSnapshot(root, "c", current(folder_of(root, "c")), **options)


def check(root, expected, queries, k=10):
    for mine, oracle in zip(
        opened(root).search(queries, k, allowed=[None] * len(queries)), expected.search(queries, k), strict=True
    ):
        np.testing.assert_array_equal(mine, oracle)


def grown(root: Path):
    """A collection of three segments with replaced and deleted documents and many equal vectors."""
    rng, expected = np.random.default_rng(0), Expected()
    pool = unit(rng, 60, DIMENSION)
    numbers = iter(range(100))
    for name, ids, cuts in (
        ("base", [f"d{row}" for row in range(900)], [0, 400, 900]),
        ("more", ["d999"] + [f"d{row}" for row in range(850, 1000)] + ["x"], [0, 1, 152]),
        ("again", ["d0", "x", "y"], None),
    ):
        vectors = pool[rng.integers(0, 60, len(ids))]
        metas = [{"group": int(rng.integers(0, 5)), "n": row} for row in range(len(ids))]
        rows = [document(doc_id, row, meta=json.dumps(metas[row])) for row, doc_id in enumerate(ids)]
        index = indexed(root, vectors, rows, name=f"{name}{next(numbers)}", cuts=cuts)
        if name == "base":
            collection.create(root, "c", index.id, model="model")
        else:
            collection.add_segment(root, "c", index.id)
        expected.add(ids, vectors, metas)
    gone = [f"d{row}" for row in range(0, 1000, 7)] + ["y"]
    collection.delete(root, "c", gone)
    expected.delete(gone)
    return expected, np.concatenate([unit(rng, 20, DIMENSION), pool[:10]])


def test_search_is_that_of_what_is_left(tmp_path: Path) -> None:
    """A deleted or replaced document that is found, or a live one that is not, is what snapshots are there to avoid."""
    expected, queries = grown(tmp_path)
    for k in (1, 10, 300, 1200):
        check(tmp_path, expected, queries, k)
    snapshot = opened(tmp_path)
    assert snapshot.num_documents == sum(row is not None for row in expected.rows)
    assert snapshot.num_shards == 5
    rows, _ = snapshot.search(queries[:4], 20, allowed=[None] * 4)
    for row, found in zip(rows[0], snapshot.documents(rows[0], with_text=True), strict=True):
        assert found.doc_id == expected.rows[row][0]
        assert found.text == f"text of {found.doc_id}"
        assert found.metadata == expected.rows[row][2]


def test_a_filtered_search_is_that_of_the_filtered_documents(tmp_path: Path) -> None:
    """Filtering what was found instead of what is searched gives fewer than k results, or none."""
    expected, queries = grown(tmp_path)
    snapshot = opened(tmp_path)
    cases = [
        (Comparison("group", "eq", 3), lambda row: row[2]["group"] == 3),
        (Not(Comparison("group", "eq", 3)), lambda row: row[2]["group"] != 3),
        (Comparison("n", "lt", 4), lambda row: row[2]["n"] < 4),
        (Comparison("doc_id", "in", ("d1", "d0", "y")), lambda row: row[0] in ("d1", "d0", "y")),
        (Comparison("task", "eq", "none"), lambda row: False),
        (None, lambda row: True),
    ]
    allowed = [cases[number % len(cases)][0] for number in range(len(queries))]
    for _ in range(2):  # the second time from the cache
        rows, scores = snapshot.search(queries, 30, allowed=allowed)
        for number in range(len(queries)):
            oracle = expected.search(queries[number : number + 1], 30, cases[number % len(cases)][1])
            np.testing.assert_array_equal(rows[number], oracle[0][0])
            np.testing.assert_array_equal(scores[number], oracle[1][0])


def test_shards_opened_apart_merge_to_the_whole(tmp_path: Path) -> None:
    """Serving spreads shards over processes; their results must add up to the same answer."""
    expected, queries = grown(tmp_path)
    parts = [opened(tmp_path, shards=numbers) for numbers in ([0, 3], [4], [1, 2])]
    for chosen, holds in ((None, lambda row: True), (Comparison("group", "eq", 3), lambda row: row[2]["group"] == 3)):
        found = [part.search(queries, 15, allowed=[chosen] * len(queries)) for part in parts]
        rows, scores = (np.concatenate([part[which] for part in found], axis=1) for which in (0, 1))
        for mine, oracle in zip(select_topk(rows, scores, 15), expected.search(queries, 15, holds), strict=True):
            np.testing.assert_array_equal(mine, oracle)
    with pytest.raises(DataError, match="shards 0 to 4"):
        opened(tmp_path, shards=[5])
    rows, _ = opened(tmp_path, shards=[]).search(queries, 3, allowed=[None] * len(queries))
    assert (rows == MISSING).all()


def test_fillers_are_no_documents(tmp_path: Path) -> None:
    """Row -1 read from a table is its last document."""
    expected, _ = grown(tmp_path)
    with pytest.raises(DataError, match="row -1 is none"):
        opened(tmp_path).documents([0, MISSING], with_text=False)
    with pytest.raises(DataError, match="is none"):
        opened(tmp_path).documents([len(expected.rows)], with_text=False)


def test_rollback_and_the_same_command_again(tmp_path: Path) -> None:
    """Going back must bring exactly what was, and a repeated command must not pile up snapshots."""
    index = indexed(tmp_path, unit(np.random.default_rng(1), 50, DIMENSION))
    first = collection.create(tmp_path, "c", index.id, model="model")
    assert collection.create(tmp_path, "c", index.id, model="model").snapshot == first.snapshot
    with pytest.raises(DataError, match="only"):
        collection.rollback(tmp_path, "c")
    second = collection.delete(tmp_path, "c", ["d1", "d1", "d2", "none"])
    assert (second.num_deleted, second.num_unknown, second.num_documents) == (2, 1, 48)
    again = collection.delete(tmp_path, "c", ["d1", "d2", "none"])
    assert (again.snapshot, again.num_deleted, again.num_unknown) == (second.snapshot, 0, 3)
    assert collection.rollback(tmp_path, "c").snapshot == first.snapshot
    assert opened(tmp_path).num_documents == 50
    assert collection.delete(tmp_path, "c", ["d2", "d1"]).snapshot == second.snapshot
    assert [entry["is_current"] for entry in collection.snapshots(tmp_path, "c")] == [False, True]
    other = indexed(tmp_path, unit(np.random.default_rng(2), 9, DIMENSION), name="other")
    with pytest.raises(DataError, match="--replace"):
        collection.create(tmp_path, "c", other.id, model="model")
    assert collection.create(tmp_path, "c", other.id, model="model", replace=True).num_documents == 9
    assert collection.rollback(tmp_path, "c").snapshot == second.snapshot


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    """Vectors of two embedders of one size compare without an error and mean nothing."""
    rng = np.random.default_rng(1)
    collection.create(tmp_path, "c", indexed(tmp_path, unit(rng, 20, DIMENSION)).id, model="model")
    other = indexed(tmp_path, unit(rng, 5, DIMENSION), name="other", embedder="other")
    with pytest.raises(DataError, match="encoder"):
        collection.add_segment(tmp_path, "c", other.id)
    narrow = indexed(tmp_path, unit(rng, 5, 8), name="narrow")
    with pytest.raises(DataError, match="dimension"):
        collection.add_segment(tmp_path, "c", narrow.id)
    assert opened(tmp_path, encoder=opened(tmp_path).encoder).num_documents == 20
    with pytest.raises(DataError, match="encoder"):
        opened(tmp_path, encoder="other")


@pytest.mark.parametrize("victim", ["files/shard-00001.faiss", "parts/ids-00000.parquet", "corpus", "deleted", "embed"])
def test_changed_bytes_are_noticed(tmp_path: Path, victim: str) -> None:
    """FAISS loads 3 of 4 damaged files without an error, and Parquet many with other values."""
    grown(tmp_path)
    snapshot = opened(tmp_path)
    segment = snapshot.manifest["segments"][0]
    path = {
        "corpus": tmp_path / segment["prepare"] / "parts" / "corpus-00000.parquet",
        "deleted": folder_of(tmp_path, "c") / "snapshots" / snapshot.id / "deleted.parquet",
        "embed": tmp_path / segment["embeddings"] / "parts" / "document_embeddings-00000.parquet",
    }.get(victim, tmp_path / segment["index"] / victim)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="bytes changed"):
        OpenSnapshot(tmp_path, "c", snapshot.id, shards=[]).verify()
    if victim in ("files/shard-00001.faiss", "deleted"):
        with pytest.raises(DataError, match="bytes changed"):
            opened(tmp_path)
    if victim == "corpus":
        with pytest.raises(DataError, match="bytes changed"):
            opened(tmp_path).documents([3], with_text=True)
        with pytest.raises(DataError, match="bytes changed"):
            opened(tmp_path).search(np.zeros((1, DIMENSION), np.float32), 2, allowed=[Comparison("n", "eq", 1)])
    if victim.startswith("parts/ids"):
        with pytest.raises(DataError, match="bytes changed"):
            collection.delete(tmp_path, "c", ["d5"])


def added(root: Path, vectors, ids, name):
    """Adds the same file as often as it is called: its index is made once."""
    return collection.add_segment(root, "c", indexed(root, vectors, [document(i, 0) for i in ids], name=name).id)


def test_what_is_added_again_is_there_again(tmp_path: Path) -> None:
    """A file that is added once more must bring back what was deleted or replaced since; nobody says otherwise."""
    rng, expected = np.random.default_rng(0), Expected()
    base, first, second = unit(rng, 30, DIMENSION), unit(rng, 4, DIMENSION), unit(rng, 3, DIMENSION)
    collection.create(tmp_path, "c", indexed(tmp_path, base).id, model="model")
    expected.add([f"d{row}" for row in range(30)], base)
    one, two = ["a", "b", "d3", "a"], ["b", "d3", "z"]
    queries = np.concatenate([first, second, base[:5]])

    def add(vectors, ids, name):
        done = added(tmp_path, vectors, ids, name)
        expected.add(ids, vectors)
        check(tmp_path, expected, queries)
        return done

    add(first, one, "one")
    again = added(tmp_path, first, one, "one")
    assert (again.num_added, len(collection.snapshots(tmp_path, "c"))) == (0, 2)  # all of it is there
    collection.delete(tmp_path, "c", ["b", "d5"])
    expected.delete(["b", "d5"])
    assert add(first, one, "one").num_replaced == 2
    add(second, two, "two")
    assert add(first, one, "one").num_added == 3
    assert len(collection.snapshots(tmp_path, "c")) == 6
    # What others added meanwhile has nothing to do with it.
    add(unit(rng, 1, DIMENSION), ["w"], "three")
    assert added(tmp_path, first, one, "one").num_added == 0
    assert opened(tmp_path).num_documents == sum(row is not None for row in expected.rows) == 33


def test_an_id_that_an_index_has_twice_is_refused(tmp_path: Path) -> None:
    """Of two pools, deleting one of the documents would take the other along."""
    rows = [document("a", 0), document("b", 1), document("a", 2, pool="other")]
    with pytest.raises(DataError, match="comes again, the first is 'a'"):
        collection.create(tmp_path, "c", indexed(tmp_path, unit(np.random.default_rng(0), 3, 8), rows).id, model="m")
    assert not (folder_of(tmp_path, "c") / "CURRENT").exists()


def test_damaged_names_and_manifests_say_so(tmp_path: Path) -> None:
    """A traceback tells an operator neither which file it is nor what to do."""
    grown(tmp_path)
    folder = folder_of(tmp_path, "c")
    first, *_, last = (entry["id"] for entry in collection.snapshots(tmp_path, "c"))
    for text in ("", "[]", '{"previous": null}', "\xff"):
        (folder / "snapshots" / first / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=f"{first}/manifest.json is damaged.*delete"):
            collection.snapshots(tmp_path, "c")
    assert [entry["id"] for entry in collection.snapshots(tmp_path, "c", skip_damaged=True)][-1] == last
    assert opened(tmp_path).id == last
    for text in ("", "[]", '{"previous": null}', "\xff"):
        (folder / "CURRENT").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match="CURRENT is damaged"):
            named(folder)
    assert CliRunner().invoke(index_cli.app, ["list", "c", "--root", str(tmp_path)]).exit_code == 3


def test_caches_keep_no_more_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long filters over few documents, and many segments: what a cache does not count can fill memory."""
    monkeypatch.setattr(snapshots_module, "_masks", snapshots_module._Cache(20 << 10))
    monkeypatch.setattr(snapshots_module, "_groups", snapshots_module._Cache(20 << 10))
    _, queries = grown(tmp_path)
    snapshots = [opened(tmp_path) for _ in range(2)]
    tracemalloc.start()
    for number in range(40):
        chosen = Comparison("doc_id", "in", tuple(f"{number} {value} " + 1000 * "x" for value in range(20)))
        for snapshot in snapshots:
            snapshot.search(queries[:1], 3, allowed=[chosen])
            rows, _ = snapshot.search(queries[number % 30 :][:1], 20, allowed=[None])
            snapshot.documents(rows[0], with_text=True)
    grew = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for cache in (snapshots_module._masks, snapshots_module._groups):
        assert cache._room >= 0
        assert len(cache._kept) <= 20
    assert grew < 500_000


class Killed(BaseException):
    pass


def test_what_was_accepted_is_remembered_of_that_snapshot_alone(tmp_path: Path) -> None:
    """An operator's word about one snapshot must survive every restart and mean no other."""
    rng = np.random.default_rng(1)
    first = collection.create(tmp_path, "c", indexed(tmp_path, unit(rng, 20, DIMENSION)).id, model="model").snapshot
    folder = folder_of(tmp_path, "c")
    # As it was written before there was anything to accept.
    (folder / "CURRENT").write_text(json.dumps({"current": first, "previous": None}))
    assert named(folder) == Named(current=first, previous=None, accepted=None)
    second = collection.delete(tmp_path, "c", ["d3"]).snapshot
    said = CliRunner().invoke(index_cli.app, ["accept", "c", "--root", str(tmp_path), "--json"])
    assert json.loads(said.stdout)["snapshot"] == second
    assert named(folder) == Named(current=second, previous=first, accepted=second)
    third = collection.delete(tmp_path, "c", ["d4"]).snapshot
    assert named(folder) == Named(current=third, previous=second, accepted=second)
    collection.rollback(tmp_path, "c")
    assert named(folder) == Named(current=second, previous=third, accepted=second)
    with pytest.raises(DataError, match="no collection"):
        collection.accept(tmp_path, "d")


@pytest.mark.parametrize("point", range(6))
def test_a_kill_leaves_the_current_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """A writer that dies may cost its own work, never what is served; the same command goes on."""
    rng = np.random.default_rng(1)
    before = collection.create(tmp_path, "c", indexed(tmp_path, unit(rng, 20, DIMENSION)).id, model="model").snapshot
    rename, flush, calls = durable.commit_rename, durable.flush, []

    def dying(real, early):
        def call(*arguments):
            calls.append(arguments)
            if early and len(calls) == point + 1:
                raise Killed
            real(*arguments)
            if not early and len(calls) == point + 1:
                raise Killed

        return call

    monkeypatch.setattr(durable, "remove", lambda path: None)  # a kill removes nothing
    monkeypatch.setattr(durable, "commit_rename", dying(rename, True))
    monkeypatch.setattr(durable, "flush", dying(flush, False))
    died = False
    try:
        collection.delete(tmp_path, "c", ["d3"])
    except Killed:
        died = True
    monkeypatch.undo()
    now = current(folder_of(tmp_path, "c"))
    assert opened(tmp_path).num_documents == (20 if now == before else 19)
    if died:
        assert collection.delete(tmp_path, "c", ["d3"]).num_documents == 19
    assert opened(tmp_path).num_documents == 19
    names = {path.name for path in folder_of(tmp_path, "c").glob("snapshots/*")}
    assert len(names) == 2


def test_names_cannot_leave_the_store(tmp_path: Path) -> None:
    """A collection's name comes from requests; a path in it would read other files."""
    for name in ("../x", "a/b", "", ".", "-x", "a" * 65):
        with pytest.raises(DataError, match="name"):
            folder_of(tmp_path, name)
    for snapshot_id in ("../../x", "000001-xyz", ""):
        with pytest.raises(DataError, match="snapshot's id"):
            OpenSnapshot(tmp_path, "c", snapshot_id)
    with pytest.raises(DataError, match="no collection"):
        current(folder_of(tmp_path, "c"))
