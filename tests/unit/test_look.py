"""Early looks: what is measured, against a loop, and that training never waits for or suffers from one."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from llmr_ray.evaluation import look
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact


def tables(num_queries=6):
    """A shared pool of 30 documents for `qa`; a history of 10 for each query of `chat`, of which it sees 6."""
    queries, corpus, qrels = [], [], []
    rng = np.random.default_rng(0)
    for number in range(30):
        corpus.append({"doc_id": f"d{number}", "pool": "a", "position": number, "task": "qa", "text": f"text {number}"})
    for number in range(num_queries):
        pool = f"b{number}"
        for turn in range(10):
            corpus.append(
                {"doc_id": f"{pool}-{turn}", "pool": pool, "position": turn, "task": "chat", "text": f"{pool} {turn}"}
            )
        for task, pool_of, end in (("qa", "a", None), ("chat", pool, 6)):
            query = {"query_id": f"{task}{number}", "task": task, "dataset": f"{task}-set", "query": f"ask {number}"}
            queries.append(query | {"split": "dev", "targets": [], "pool": pool_of, "history_end": end})
        qrels.append({"query_id": f"qa{number}", "doc_id": f"d{rng.integers(30)}", "relevance": 1})
        qrels.append({"query_id": f"chat{number}", "doc_id": f"{pool}-{rng.integers(6)}", "relevance": 1})
    queries.append(queries[0] | {"query_id": "of-test", "split": "test"})
    queries.append(queries[0] | {"query_id": "unlabelled"})
    made = (("queries", queries), ("corpus", corpus), ("qrels", qrels))
    return [table_of(name, rows) for name, rows in made]


def prepared(root):
    """`tables` as prepare leaves them."""
    return make_artifact(root, "prepare", dict(zip(("queries", "corpus", "qrels"), tables(), strict=True)))


def encode(texts, task, side):
    """Any unit vectors that depend on everything."""
    rows = [np.random.default_rng(abs(hash((text, task, side))) % 2**32).normal(size=8) for text in texts]
    return np.asarray([row / np.linalg.norm(row) for row in rows], np.float32)


def test_means_equal_a_loop_over_queries(tmp_path):
    """Prevents documents outside a query's history from being found, and labels that point to other rows."""
    sets = look.look_sets(prepared(tmp_path), 100)
    assert [of.dataset for of in sets] == ["chat-set", "qa-set"]
    queries, corpus, qrels = (table.to_pylist() for table in tables())
    gold = {row["query_id"]: row["doc_id"] for row in qrels}
    found = look.measure(sets, encode)
    for of in sets:
        values = []
        for query in queries:
            if query["dataset"] != of.dataset or query["query_id"] not in gold or query["split"] != "dev":
                continue
            seen = [row for row in corpus if row["pool"] == query["pool"]]
            seen = [row for row in seen if query["history_end"] is None or row["position"] < query["history_end"]]
            [vector] = encode([query["query"]], of.task, "query")
            scores = encode([row["text"] for row in seen], of.task, "document") @ vector
            rank = [seen[place]["doc_id"] for place in np.argsort(-scores)].index(gold[query["query_id"]])
            values.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
        assert len(values) == len(of.queries) == 6
        assert found[of.dataset] == pytest.approx(np.mean(values), abs=1e-6)


def test_a_look_is_small_whatever_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "POOL_DOCUMENTS", 5)
    of = look.look_sets(prepared(tmp_path), 3)[1]
    assert len(of.queries) == 3
    assert 5 <= len(of.documents) <= 8  # those drawn and the gold ones
    assert all(of.qrels[query_id] for query_id in of.query_ids)


class Models:
    """Measures models by what their folder's name says; each waits until it is let go."""

    def __init__(self):
        self.asked, self.futures = [], []
        self.changed = threading.Condition()

    def __call__(self, model):
        with self.changed:
            self.asked.append(model.name)
            self.futures.append(Future())
            self.changed.notify_all()
        return self.futures[-1]

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) == count, timeout=30)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(look.checkpoint, "last_saved", lambda root: saved[-1] if saved else None)
    saved = []
    return {"root": tmp_path, "base": tmp_path / "base", "folder": tmp_path / "run"}, saved


def test_base_then_newest_and_at_the_end_the_last(places):
    """Prevents a queue of old checkpoints, and a training whose end nobody looked at."""
    (where, saved), models = places, Models()
    with look.early_look(models, artifact_id="train/1", **where):
        models.wait(1)
        saved += [(step, where["root"] / f"step{step}") for step in (5, 10)]
        models.futures[0].set_result({"a": 0.1})
        models.wait(2)
        models.futures[1].set_exception(FileNotFoundError("gone"))  # training deletes old checkpoints
        saved.append((15, where["root"] / "step15"))
        models.wait(3)
        models.futures[2].set_result({"a": 0.3})
        saved.append((20, where["root"] / "step20"))
        models.wait(4)
        models.futures[3].set_result({"a": 0.4})
    assert models.asked == ["base", "step10", "step15", "step20"]
    found = look.read_looks(where["folder"], "train/1")
    assert [(one["step"], one["values"]["a"]) for one in found] == [(0, 0.1), (15, 0.3), (20, 0.4)]
    assert look.read_looks(where["folder"], "train/2") == []


def test_what_failed_is_not_tried_again(places):
    """Prevents a base model that cannot be measured from keeping every checkpoint from being looked at."""
    (where, saved), models = places, Models()
    with look.early_look(models, artifact_id="train/1", **where):
        models.wait(1)
        models.futures[0].set_exception(MemoryError("no room"))
        saved.append((5, where["root"] / "step5"))
        models.wait(2)
        models.futures[1].set_result({"a": 0.2})
    assert models.asked == ["base", "step5"]
    assert [one["step"] for one in look.read_looks(where["folder"], "train/1")] == [5]


def test_what_was_looked_at_is_not_looked_at_again(places):
    """Prevents a resumed run from beginning with the base model once more."""
    (where, saved), models = places, Models()
    saved.append((5, where["root"] / "step5"))
    for _ in range(2):
        with look.early_look(models, artifact_id="train/1", **where):
            if not models.futures:
                models.wait(1)
                models.futures[0].set_result({"a": 0.1})
                models.wait(2)
                models.futures[1].set_result({"a": 0.2})
    assert models.asked == ["base", "step5"]


def test_without_a_look_nothing_is_written(places):
    (where, _), reached = places, []
    with look.early_look(None, artifact_id="train/1", **where):
        reached.append(True)
    assert reached
    assert not where["folder"].exists()
