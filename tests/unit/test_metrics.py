"""Retrieval measures and the TREC files that other tools recompute them from."""

import ir_measures
import numpy as np
import pytest

from llmr_ray.evaluation.metrics import retrieval_values, trec_scores
from llmr_ray.evaluation.trec import write_trec
from llmr_ray.schemas import table_of

RANKING = [("5", 0.9), ("1", 0.8), ("9", 0.7), ("2", 0.6), ("7", 0.5)]


def test_ndcg_has_the_check_value():
    """An ideal DCG over k instead of min(k, labels), or a log of the wrong base, shifts every figure (A.7)."""
    values = retrieval_values({"q": {"1": 1, "2": 1, "3": 1}}, {"q": RANKING}, ["nDCG@5", "nDCG@3", "R@10"])
    assert values["nDCG@5"]["q"] == pytest.approx(0.4981893, abs=5e-8)
    assert values["nDCG@3"]["q"] == pytest.approx(0.2960820, abs=2e-7)
    assert values["R@10"]["q"] == pytest.approx(2 / 3)


def test_a_query_without_results_counts_zero():
    """Averaging over predictions instead of queries flatters a retriever that finds nothing (I.20)."""
    qrels = {"q": {"1": 1}, "unranked": {"1": 1}, "empty": {"1": 1}}
    values = retrieval_values(qrels, {"q": RANKING, "empty": [], "stranger": RANKING}, ["nDCG@5"])["nDCG@5"]
    assert set(values) == set(qrels)
    assert values["unranked"] == values["empty"] == 0.0


def test_nobody_ranked_anything():
    """A library given an empty run returns nothing at all; the queries must not vanish."""
    assert retrieval_values({"q": {"1": 1}}, {}, ["nDCG@5", "R@10"]) == {"nDCG@5": {"q": 0.0}, "R@10": {"q": 0.0}}


def test_tied_scores_keep_our_order():
    """trec_eval breaks ties by document id: two tied documents would be judged in an order we never returned."""
    tied = [("a", 0.5), ("z", 0.5), ("y", 0.5)]
    assert retrieval_values({"q": {"a": 1}}, {"q": tied}, ["nDCG@1"])["nDCG@1"]["q"] == 1.0
    assert retrieval_values({"q": {"z": 1}}, {"q": tied}, ["nDCG@1"])["nDCG@1"]["q"] == 0.0


def test_scores_become_strictly_decreasing_in_float32():
    """float32 swallows a decrement below its resolution, and the tie is back."""
    scores = trec_scores([1e6, 1e6, 1e6, 0.0, 0.0, -3.0, -3.0])
    assert scores.dtype == np.float32
    assert (np.diff(scores) < 0).all()
    np.testing.assert_allclose(scores, [1e6, 1e6, 1e6, 0, 0, -3, -3], rtol=1e-6, atol=1e-6)


def test_the_exported_files_give_the_same_figures(tmp_path):
    """A run whose text loses digits, ids or ties cannot be checked by anyone else's tool."""
    rng = np.random.default_rng(0)
    run, qrels, datasets, rankings, labels = [], [], {}, {}, {}
    for number in range(30):
        query_id = f"set/q {number}"
        datasets[query_id] = "set"
        docs = [f"doc {row}" for row in rng.permutation(40)[:20]]
        scores = np.sort(rng.choice([0.1, 0.2, 0.3], size=20))[::-1].astype(np.float32)
        rankings[query_id] = list(zip(docs, scores.tolist(), strict=True))
        labels[query_id] = {doc: 1 for doc in rng.choice(docs, size=3, replace=False).tolist()}
        run += [
            {"run_name": "base", "query_id": query_id, "doc_id": doc, "rank": rank, "score": float(score)}
            for rank, (doc, score) in enumerate(rankings[query_id], 1)
        ]
        qrels += [{"query_id": query_id, "doc_id": doc, "relevance": 1} for doc in labels[query_id]]
    qrels.append({"query_id": "train", "doc_id": "doc 1", "relevance": 1})
    files = write_trec(tmp_path, table_of("run", run), table_of("qrels", qrels), datasets)
    assert [path.name for path in files] == ["set.base.run.trec", "set.qrels.trec"]
    measures = [ir_measures.parse_measure("nDCG@10"), ir_measures.parse_measure("R@5")]
    again = ir_measures.calc_aggregate(
        measures,
        ir_measures.read_trec_qrels(str(tmp_path / "set.qrels.trec")),
        ir_measures.read_trec_run(str(tmp_path / "set.base.run.trec")),
    )
    ours = retrieval_values(labels, rankings, ["nDCG@10", "R@5"])
    for measure in measures:
        assert again[measure] == pytest.approx(np.mean(list(ours[str(measure)].values())), abs=1e-12)


def test_datasets_without_labels_have_no_files(tmp_path):
    """A run without qrels looks like an evaluation and is none."""
    run = table_of("run", [{"run_name": "base", "query_id": "q", "doc_id": "d", "rank": 1, "score": 1.0}])
    assert write_trec(tmp_path, run, table_of("qrels", []), {"q": "chat"}) == []
