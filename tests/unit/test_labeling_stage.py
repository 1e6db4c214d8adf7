"""The stages select and label over three rounds, with labels of known quality and a retriever of unit vectors."""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, DatasetConfig, RuntimeConfig, TaskConfig, TaskScore
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation.annotators import compared
from llmr_ray.evaluation.report import _annotations, labels_told
from llmr_ray.index.vectors import to_table
from llmr_ray.labeling.calibration import is_calibration
from llmr_ray.labeling.consensus import consensus_spec, run_consensus
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.labeling.simulation import gold_labels
from llmr_ray.labeling.stage import gold_spec, label_spec, run_gold, run_label, run_select, select_spec
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact

NUM_QUESTIONS, NUM_CANDIDATES, DIMENSION = 60, 8, 16


@pytest.fixture
def config(tmp_path):
    return Config(
        datasets={"main": DatasetConfig(task="qa")},
        tasks={"qa": TaskConfig(score=TaskScore(feedback="label"))},
        labeling=AdaptiveConfig(
            enabled=True, annotator="gold", calls_per_round=160, calibration_fraction=0.2, min_gain=-1
        ),
        rounds=3,
        runtime=RuntimeConfig(artifact_root=str(tmp_path)),
    )


@pytest.fixture
def world(tmp_path):
    """Prepare, mined candidates, and a retriever that likes each question's gold document best, but for noise."""
    queries = [
        {"query_id": f"q{n}", "task": "qa", "dataset": "main", "query": f"q {n}", "targets": [], "split": "train"}
        | {"pool": "p"}
        for n in range(NUM_QUESTIONS)
    ]
    doc_ids = [f"d{n}" for n in range(NUM_QUESTIONS * NUM_CANDIDATES)]
    corpus = [
        {"doc_id": name, "pool": "p", "position": n, "task": "qa", "text": f"text {n}"}
        for n, name in enumerate(doc_ids)
    ]
    of_query = {f"q{n}": doc_ids[n * NUM_CANDIDATES : (n + 1) * NUM_CANDIDATES] for n in range(NUM_QUESTIONS)}
    qrels = [{"query_id": query, "doc_id": docs[0], "relevance": 1} for query, docs in of_query.items()]
    mined = [{"query_id": query, "doc_id": doc, "source": "bm25"} for query, docs in of_query.items() for doc in docs]
    prepare = {
        name: table_of(name, rows) for name, rows in (("queries", queries), ("corpus", corpus), ("qrels", qrels))
    }
    return {
        "prepare": make_artifact(tmp_path, "prepare", prepare),
        "candidates": make_artifact(tmp_path, "mine", {"candidates": table_of("candidates", mined)}),
        "embeddings": retriever(tmp_path, 2.0),
    }


def retriever(root, strength):
    """Vectors of all texts; the stronger, the nearer are gold documents to their questions."""
    rng = np.random.default_rng(0)
    query_QD = rng.normal(size=(NUM_QUESTIONS, DIMENSION))
    document_ND = rng.normal(size=(NUM_QUESTIONS * NUM_CANDIDATES, DIMENSION))
    document_ND[::NUM_CANDIDATES] += strength * query_QD

    def table(key, prefix, vector_ND):
        unit_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
        return to_table(key, [f"{prefix}{n}" for n in range(len(unit_ND))], unit_ND.astype(np.float32))

    vectors = {
        "query_embeddings": table("query_id", "q", query_QD),
        "document_embeddings": table("doc_id", "d", document_ND),
    }
    return make_artifact(root / str(strength), "embed", vectors)


def made(config, spec, run, **of):
    artifact = Artifact(config.runtime.artifact_root, spec)
    artifact.begin()
    run(config, artifact, **of)
    return artifact


def a_round(config, world, number, labels, candidates=None):
    of = world | {"labels": labels} | ({"candidates": candidates} if candidates else {})
    selected = made(config, select_spec(config, number=number, **of), run_select, number=number, **of)
    of = {"prepare": world["prepare"], "candidates": selected}
    scores = made(config, gold_spec(config, **of), run_gold, **of)
    of = {"prepare": world["prepare"], "embeddings": world["embeddings"], "selected": selected, "llm_scores": scores}
    of |= {"labels": labels}
    return selected, made(config, label_spec(config, **of), run_label, **of)


def pairs_in(artifact, table):
    return {(row["query_id"], row["doc_id"]): row for row in artifact.read(table).to_pylist()}


def test_the_first_round_labels_whole_questions_within_its_calls(config, world):
    """Prevents a seed of scattered pairs, of which no question has enough to learn an order from."""
    selected, labels = a_round(config, world, 1, None)
    asked = [row["query_id"] for row in selected.read("asked").to_pylist()]
    assert len(asked) <= config.labeling.calls_per_round
    assert {asked.count(name) for name in asked} == {NUM_CANDIDATES}
    assert len(asked) > config.labeling.calls_per_round - 2 * NUM_CANDIDATES
    kept = {name for name in asked if is_calibration(name, 0.2)}
    assert kept
    gold = set(pairs_in(world["prepare"], "qrels"))
    for pair, row in pairs_in(labels, "labels").items():
        assert (row["label"], row["source"]) == (float(pair in gold), "gold"), "an annotator of known quality is no LLM"
    trains = {query for query, _ in pairs_in(labels, "rewards")}
    assert trains == set(asked) - kept
    counts = selected.manifest["counts"]
    assert (counts["rows_in"], counts["ok"]) == (NUM_QUESTIONS * NUM_CANDIDATES, len(asked))
    assert counts["skipped"] == {"not_seeded": NUM_QUESTIONS * NUM_CANDIDATES - len(asked)}


def test_later_rounds_spend_calls_where_the_retriever_is_unsure(config, world):
    """Over three rounds every pair is accounted for, no call is paid twice, and no calibration question trains."""
    labels, paid = None, set()
    for number in (1, 2, 3):
        selected, labels = a_round(config, world, number, labels)
        asked = set(pairs_in(selected, "asked"))
        assert not asked & paid
        assert len(asked) <= config.labeling.calls_per_round
        paid |= asked
        assert labels.manifest["extra"]["spent"] == len(paid)
        assert set(pairs_in(selected, "decisions")) == set(pairs_in(world["candidates"], "candidates"))
        held = pairs_in(labels, "labels")
        assert {pair for pair, row in held.items() if row["source"] == "gold"} == paid
        assert not {query for query, _ in pairs_in(labels, "rewards") if is_calibration(query, 0.2)}
    pseudo = [row for row in held.values() if row["source"] == "retriever"]
    assert pseudo
    assert {row["reward_source"] for row in pairs_in(labels, "rewards").values()} == {"label", "pseudo"}
    assert len(paid) < 0.9 * NUM_QUESTIONS * NUM_CANDIDATES
    told = selected.manifest["extra"]
    assert 0 < told["thresholds"]["lo"] < told["thresholds"]["hi"] < 1
    assert told["ndcg"] > 0.9
    shown = [labels_told(told) for told in labels.manifest["extra"]["rounds"]]
    assert [row["round"] for row in shown] == [1, 2, 3]
    assert sum(row["calls"] for row in shown) == shown[-1]["spent"] == len(paid)
    assert {(row["annotator"], row["pairs"]) for row in shown} == {("gold", NUM_QUESTIONS * NUM_CANDIDATES)}
    assert sum(shown[-1]["labels"].values()) == len(paid)
    assert sum(shown[-1]["pseudo"].values()) == len(pseudo)
    assert shown[-1]["right"][0] == [1.0, 1.0]
    precision = {row["source"]: row for row in labels.manifest["extra"]["rounds"][-1]["quality"] if row["label"] == 0.0}
    assert precision["retriever"]["precision"] > 0.9


def ndcg_naively(labels, embeddings):
    """Over calibration questions with a label above 0, their labelled pairs by cosine; gains 1 and 2."""
    vectors = {}
    for name in ("query", "document"):
        table = embeddings.read(f"{name}_embeddings")
        ids, vector_ND = table.column(0).to_pylist(), np.stack(table.column(1).to_pylist())
        vectors |= dict(zip(ids, vector_ND.astype(float), strict=True))
    judged = defaultdict(list)
    for row in labels.read("labels").to_pylist():
        if is_calibration(row["query_id"], 0.2):
            cosine = float(vectors[row["query_id"]] @ vectors[row["doc_id"]])
            judged[row["query_id"]].append((cosine, 2 * row["label"]))
    found = []
    for rows in judged.values():
        gains = [gain for _, gain in sorted(rows, reverse=True)[:10]]
        ideal = sorted((gain for _, gain in rows), reverse=True)[:10]
        if any(gains):
            found.append(np.dot(gains, weights(gains)) / np.dot(ideal, weights(ideal)))
    return np.mean(found), len(found)


def weights(gains):
    return [1 / math.log2(place + 2) for place in range(len(gains))]


def test_a_gain_is_that_of_two_retrievers_on_the_same_labels(config, world, tmp_path):
    """Prevents a round from seeming better or worse than the one before because other questions were labelled since."""
    settings = dataclasses.replace(config.labeling, calibration_share=0.3)
    config = dataclasses.replace(config, labeling=settings)
    labels, before, num_before = None, None, 0
    for number, strength in ((1, 0.4), (2, 0.6), (3, 0.8)):
        world["embeddings"] = retriever(tmp_path, strength)
        if labels is not None:
            now, _ = ndcg_naively(labels, world["embeddings"])
        selected, labels = a_round(config, world, number, labels)
        told = selected.manifest["extra"]
        if before is not None:
            assert (told["ndcg_before"], told["ndcg"]) == (pytest.approx(before), pytest.approx(now))
            assert labels.manifest["extra"]["rounds"][-1]["ndcg"] == told["ndcg"]
        before, num_questions = ndcg_naively(labels, world["embeddings"])
        assert num_questions > num_before, "each round labels further calibration questions"
        num_before = num_questions


def test_once_stopped_nothing_is_asked_and_all_labels_stay(config, world, tmp_path):
    """Prevents a stop that is told and not kept, and one that loses the retriever's own labels."""
    settings = dataclasses.replace(config.labeling, min_gain=0.005)
    config = dataclasses.replace(config, labeling=settings)
    _, first = a_round(config, world | {"embeddings": retriever(tmp_path, -1.0)}, 1, None)
    selected, second = a_round(config, world, 2, first)
    assert selected.manifest["extra"]["stop"] is None
    held = pairs_in(second, "labels")
    pseudo = {pair for pair, row in held.items() if row["source"] == "retriever"}
    assert pseudo
    lost = next(doc_id for _, doc_id in sorted(pseudo))
    mined = [row for row in world["candidates"].read("candidates").to_pylist() if row["doc_id"] != lost]
    fewer = make_artifact(tmp_path / "again", "mine", {"candidates": table_of("candidates", mined)})
    labels = second
    # The retriever of round 3 is that of round 2, which gains nothing; that of round 4 would, but the rule was told.
    for number, strength in ((3, 2.0), (4, 9.0)):
        selected, labels = a_round(config, world | {"embeddings": retriever(tmp_path, strength)}, number, labels, fewer)
        told = selected.manifest["extra"]
        assert (told["stop"], told["calls"]) == ("no_gain", 0)
        assert selected.read("asked").num_rows == 0
        assert pairs_in(labels, "labels") == held
        assert pairs_in(labels, "rewards") == pairs_in(second, "rewards")
        assert set(pairs_in(labels, "rewards")) <= set(pairs_in(selected, "candidates"))
        counts = selected.manifest["counts"]
        assert (counts["ok"], counts["cached"]) == (0, len(held))
        assert counts["skipped"] == {"stopped": counts["rows_in"] - len(held)}
        assert labels.manifest["extra"]["spent"] == second.manifest["extra"]["spent"]
        assert labels_told(labels.manifest["extra"]["rounds"][-1])["calls"] == 0


def test_without_a_question_to_tell_a_gain_by_rounds_go_on(config, world, tmp_path):
    """Prevents a number that is only a guide from ending a run that has been paid for."""
    settings = dataclasses.replace(config.labeling, min_gain=0.005)
    config = dataclasses.replace(config, labeling=settings)
    # The annotator finds nothing relevant in calibration questions.
    qrels = [row for row in world["prepare"].read("qrels").to_pylist() if not is_calibration(row["query_id"], 0.2)]
    tables = {"qrels": table_of("qrels", qrels)} | {name: world["prepare"].read(name) for name in ("queries", "corpus")}
    world["prepare"] = make_artifact(tmp_path / "unhelpful", "prepare", tables)
    labels = None
    for number in (1, 2):
        selected, labels = a_round(config, world, number, labels)
        assert labels.manifest["extra"]["ndcg"] is None
    told = selected.manifest["extra"]
    assert (told["ndcg_before"], told["ndcg"], told["stop"]) == (None, None, None)
    assert selected.read("asked").num_rows


@pytest.mark.parametrize(("calls", "num_kept"), [(24, 2), (40, 2), (240, 3)])
def test_few_calls_still_label_what_a_second_round_needs(config, world, calls, num_kept):
    """Prevents a second round that cannot calibrate, found out when the first is paid."""
    settings = dataclasses.replace(config.labeling, calls_per_round=calls)
    _, labels = a_round(dataclasses.replace(config, labeling=settings), world, 1, None)
    asked = Counter(query for query, _ in pairs_in(labels, "labels"))
    assert sum(is_calibration(query, 0.2) for query in asked) == num_kept
    assert asked.total() <= calls
    selected, _ = a_round(dataclasses.replace(config, labeling=settings), world, 2, labels)
    assert selected.manifest["extra"]["calibration"]["num_questions"] >= 2


def test_calls_that_reach_no_second_round_are_told_before_anything_is_paid(config, world):
    few = dataclasses.replace(config, labeling=dataclasses.replace(config.labeling, calls_per_round=23))
    with pytest.raises(
        ConfigError, match=r"have 24 pairs, and the first round may ask about 23.*Nothing has been asked"
    ):
        a_round(few, world, 1, None)
    none_kept = dataclasses.replace(config, labeling=dataclasses.replace(config.labeling, calibration_fraction=0.0))
    with pytest.raises(ConfigError, match="Of 0 and 60 there are"):
        a_round(none_kept, world, 1, None)
    _, labels = a_round(dataclasses.replace(few, rounds=1), world, 1, None)
    assert pairs_in(labels, "rewards")


def test_labels_of_pairs_that_are_mined_no_more_still_train(config, world, tmp_path):
    """Prevents paid labels from being lost when the next retriever finds other candidates."""
    _, labels = a_round(config, world, 1, None)
    mined = [row for row in world["candidates"].read("candidates").to_pylist() if row["doc_id"] not in ("d0", "d8")]
    fewer = make_artifact(tmp_path / "again", "mine", {"candidates": table_of("candidates", mined[::-1])})
    selected, after = a_round(config, world, 2, labels, fewer)
    assert set(pairs_in(labels, "rewards")) <= set(pairs_in(after, "rewards"))
    offered = selected.read("candidates").to_pylist()
    lost = {pair for pair in pairs_in(labels, "labels") if pair[1] in ("d0", "d8")}
    assert {(row["query_id"], row["doc_id"]) for row in offered if row["source"] == "earlier"} == lost
    together = [row["query_id"] for row in offered]
    assert len([name for n, name in enumerate(together) if name != together[n - 1]]) == NUM_QUESTIONS


def test_a_kill_between_tables_and_manifest_costs_nothing(config, world):
    """Prevents a stage that finds its tables written and is never finished."""
    _, first = a_round(config, world, 1, None)
    selected, labels = a_round(config, world, 2, first)
    of = world | {"labels": first}
    again = {
        selected: lambda: run_select(config, selected, number=2, **of),
        labels: lambda: run_label(
            config,
            labels,
            prepare=world["prepare"],
            embeddings=world["embeddings"],
            selected=selected,
            llm_scores=Artifact(
                config.runtime.artifact_root, gold_spec(config, prepare=of["prepare"], candidates=selected)
            ),
            labels=first,
        ),
    }
    for artifact, run in again.items():
        told = artifact.require()
        (artifact.path / "manifest.json").unlink()
        run()
        assert artifact.require() | {"seconds": 0} == told | {"seconds": 0}


def test_an_annotator_of_known_quality_errs_at_its_rates(config, world):
    settings = dataclasses.replace(config.labeling, gold_missed=0.5, gold_false_alarms=0.1, calls_per_round=480)
    _, labels = a_round(dataclasses.replace(config, labeling=settings), world, 1, None)
    gold = set(pairs_in(world["prepare"], "qrels"))
    said = {pair: row["label"] for pair, row in pairs_in(labels, "labels").items()}
    missed = np.mean([said[pair] == 0 for pair in said if pair in gold])
    alarms = np.mean([said[pair] == 1 for pair in said if pair not in gold])
    assert abs(missed - 0.5) < 4 * np.sqrt(0.25 / NUM_QUESTIONS)
    assert abs(alarms - 0.1) < 4 * np.sqrt(0.09 / (NUM_QUESTIONS * (NUM_CANDIDATES - 1)))


def test_grades_of_people_are_kept(tmp_path):
    """Prevents partly relevant passages from counting as answers, and one data set's grades from lowering another's."""
    judged = {"graded": [2, 1, 0, 3], "binary": [1, 0]}
    queries = [
        {"query_id": name, "task": "qa", "dataset": name, "query": "q", "targets": [], "split": "train", "pool": "p"}
        for name in judged
    ]
    qrels = [
        {"query_id": name, "doc_id": f"{name}{place}", "relevance": grade}
        for name, grades in judged.items()
        for place, grade in enumerate(grades)
    ]
    tables = {"queries": table_of("queries", queries), "qrels": table_of("qrels", qrels)}
    found = {row["doc_id"]: row["label"] for row in gold_labels(make_artifact(tmp_path, "prepare", tables)).to_pylist()}
    assert found == {"graded0": 1, "graded1": 0.5, "graded2": 0, "graded3": 1, "binary0": 1, "binary1": 0}


def test_a_round_tells_the_requests_that_its_pairs_took(config, world):
    """A call is a pair, and a request shows five: scattered pairs are fewer, but not as many fewer requests."""
    labels, asked = None, []
    for number in (1, 2):
        selected, labels = a_round(config, world, number, labels)
        asked.append(Counter(row["query_id"] for row in selected.read("asked").to_pylist()))
    told = labels.manifest["extra"]["rounds"]
    assert [row["requests"] for row in told] == [sum(math.ceil(n / 5) for n in of.values()) for of in asked]
    assert told[1]["requests"] / told[1]["calls"] > told[0]["requests"] / told[0]["calls"] > 1 / 5
    assert [labels_told(row)["requests"] for row in told] == [row["requests"] for row in told]


def annotated(config, of, number):
    """Two annotators who label what a round asks, one of whom calls every pair relevant, and their consensus."""
    asked, said = of["candidates"].read("asked").to_pylist(), {}
    row = {"kind": "label", "num_prompt_tokens": 1, "num_target_tokens": 0, "truncated": False, "prompt_sha": ""}
    for name in ("llm", "other"):
        spec = ArtifactSpec(stage="score", version=1, config={"of": name, "round": number}, inputs={})
        said[name] = Artifact(config.runtime.artifact_root, spec)
        said[name].begin()
        rows = [
            {**row, "query_id": pair["query_id"], "doc_id": pair["doc_id"], "scorer_id": name}
            | {"label": float(name == "other" or place % 3 == 0), "flags": []}
            for place, pair in enumerate(asked)
        ]
        counts = Counts(rows_in=len(rows), ok=len(rows), label_requests=7, llm_tokens=100)
        said[name].write_shard(0, {"llm_scores": table_of("llm_scores", rows)}, counts)
        said[name].commit(1, seconds=0, extra={"scorer_id": name})
    return made(config, consensus_spec(config, said), run_consensus, llm_scores=said)


def test_what_several_annotators_said_is_kept_over_all_rounds(config, world):
    """Prevents agreement from vanishing where the last round asks nothing, or from being that of doubtful pairs."""
    labels, num_asked = None, []
    for number in (1, 2, 3):
        settings = dataclasses.replace(config.labeling, annotator="llm", min_gain=-1 if number < 3 else 9)
        config = dataclasses.replace(config, labeling=settings)
        of = world | {"labels": labels}
        selected = made(config, select_spec(config, number=number, **of), run_select, number=number, **of)
        scores = annotated(config, {"candidates": selected}, number)
        of = {name: of[name] for name in ("prepare", "embeddings", "labels")}
        of |= {"selected": selected, "llm_scores": scores}
        labels = made(config, label_spec(config, **of), run_label, **of)
        num_asked.append(selected.read("asked").num_rows)
    assert num_asked[2] == 0 < num_asked[1]
    said = _annotations({"llm_scores": scores, "labels": labels})
    assert Counter(said["round"].to_pylist()) == {1: 2 * num_asked[0], 2: 2 * num_asked[1]}
    assert set(said["annotator"].to_pylist()) == {"llm", "other"}
    [pair] = compared(said, set(), samples=10, seed=0)["pairs"]
    assert pair["n"] == sum(num_asked)
    told = labels.manifest["extra"]["rounds"]
    assert [(row["requests"], row["tokens"]) for row in told] == [(14, 200)] * 3


def test_a_round_without_a_label_that_may_train_says_so(config, world):
    settings = dataclasses.replace(config.labeling, calls_per_round=4)
    none = dataclasses.replace(config, labeling=settings, rounds=1)
    with pytest.raises(DataError, match="calls_per_round"):
        a_round(none, world, 1, None)
