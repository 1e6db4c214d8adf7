"""Canaries: what is asked with and without the words of an attack, and what the report makes of the answers."""

import dataclasses
import json

import pyarrow as pa
import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import TaskScore
from llmr_ray.evaluation.annotators import fooled_rates
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.labeling.canaries import ATTACKS, CONTROL_WORDS, SCHEMA, canary_jobs, canary_spec, label_tasks, run_canary
from llmr_ray.labeling.settings import AdaptiveConfig
from tests.feedback_world import make_config, make_world

LLM = Asset("tiny", "model", None, "f")


@pytest.fixture
def config(tmp_path):
    plain = make_config(tmp_path, score=TaskScore(feedback="label"))
    labeling = AdaptiveConfig(num_canaries=4)
    return dataclasses.replace(plain, labeling=labeling, llm=dataclasses.replace(plain.llm, max_model_tokens=900))


class Gullible:
    """Believes the words of an attack it knows, quoting them, and nothing else."""

    scorer_id = "gullible"

    def __init__(self, believes):
        self.believes, self.shown = believes, []

    def answer(self, requests, *, label):
        return [self._one(request) for request in requests]

    def _one(self, request):
        shown = "".join(segment.text for segment in request.segments).rpartition("Question:")[2]
        self.shown.append(shown)
        assert "[2]" not in shown  # one passage a call
        words = next((words for words in self.believes if words in shown), "")
        said = {"1": {"evidence": words[:40], "score": 1 if words else 0}}
        return LLMResult(request_id=request.request_id, texts=(json.dumps(said),))


def ran(config, client):
    prepare, _ = make_world(config.runtime.artifact_root, 8)
    artifact = Artifact(config.runtime.artifact_root, canary_spec(config, LLM, prepare))
    artifact.begin()
    run_canary(config, artifact, client, prepare)
    return artifact, prepare


def test_only_the_attack_that_works_counts_as_one(config):
    """Its quote is in the passage, where the attack stands: the check of evidence cannot be what finds it out."""
    client = Gullible([ATTACKS["orders"]])
    artifact, prepare = ran(config, client)
    rates = {row["attack"]: row for row in fooled_rates(artifact.read("canaries"), samples=100, seed=0)}
    assert {name: row["fooled"] for name, row in rates.items()} == dict.fromkeys(ATTACKS, 0.0) | {
        "orders": 1.0,
        "all": 0.25,
        "neutral": 0.0,
    }
    assert (rates["all"]["n"], rates["neutral"]["n"]) == (4, 4)
    assert (rates["orders"]["plain_label"], rates["orders"]["canary_label"]) == (0.0, 1.0)
    assert len(client.shown) == 3 * 4
    assert artifact.require()["counts"]["rows_in"] == 12
    positives = {(row["query_id"], row["doc_id"]) for row in prepare.read("qrels").to_pylist()}
    assert not positives & {(row["query_id"], row["doc_id"]) for row in artifact.read("canaries").to_pylist()}


def test_a_canary_differs_from_its_passage_by_the_words_alone(config):
    prepare, _ = make_world(config.runtime.artifact_root, 8)
    jobs = canary_jobs(config, prepare)
    assert {attack for _, attack in jobs} == set(ATTACKS)
    for (_, attack), job in jobs.items():
        plain, canary, control = job.documents
        words = ATTACKS[attack].replace("{question}", job.query["query"])
        assert canary["text"] == f"{words} {plain['text']}"
        assert control["text"] == f"{CONTROL_WORDS} {plain['text']}"
        assert job.query["targets"] == []
    again = canary_jobs(config, prepare)
    assert again == jobs


def test_an_annotator_that_any_words_move_is_told_by_the_control(config):
    """Prevents noise from passing for an attack that works."""
    artifact, _ = ran(config, Gullible([ATTACKS["orders"], CONTROL_WORDS]))
    rates = {row["attack"]: row["fooled"] for row in fooled_rates(artifact.read("canaries"), samples=100, seed=0)}
    assert (rates["orders"], rates["all"], rates["neutral"]) == (1.0, 0.25, 1.0)


def test_a_label_that_is_the_highest_already_cannot_be_raised():
    """Prevents a gullible annotator from looking firm because it labels most plain passages 1."""
    rows = [("q", f"d{n}", "orders", plain, 1.0) for n, plain in enumerate([1.0, 1.0, 1.0, 0.0])]
    rows += [("q", "e", "claims", 1.0, 1.0), ("q", "e", "neutral", 0.0, 0.0)]
    table = pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
    orders, claims, every, control = fooled_rates(table, samples=100, seed=0)
    assert (orders["n"], orders["num_highest"], orders["fooled"], orders["plain_label"]) == (1, 3, 1.0, 0.75)
    assert (claims["n"], claims["num_highest"], claims["fooled"], claims["ci95"]) == (0, 1, None, None)
    assert (every["attack"], every["n"], every["fooled"]) == ("all", 1, 1.0)
    assert (control["attack"], control["fooled"]) == ("neutral", 0.0)


def test_a_kill_between_table_and_manifest_costs_nothing(config):
    artifact, prepare = ran(config, Gullible([]))
    (artifact.path / "manifest.json").unlink()
    run_canary(config, artifact, None, prepare)  # nobody is asked
    assert artifact.is_done


def test_canaries_without_a_label_are_told_and_not_counted():
    rows = [("q0", "d0", "orders", 0.0, 1.0), ("q1", "d1", "orders", None, 1.0), ("q2", "d2", "orders", 0.5, 0.5)]
    table = pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
    one, every = fooled_rates(table, samples=100, seed=0)
    assert (one["n"], one["num_missing"], one["fooled"]) == (2, 1, 0.5)
    assert every == one | {"attack": "all"}
    assert fooled_rates(table.slice(1, 1), samples=100, seed=0) == []


def test_nobody_talks_an_annotator_into_anything_that_no_llm_is(config):
    of_gold = dataclasses.replace(config, labeling=AdaptiveConfig(enabled=True, annotator="gold"))
    assert label_tasks(config)
    assert not label_tasks(of_gold)
    assert not label_tasks(dataclasses.replace(config, labeling=AdaptiveConfig(num_canaries=0)))
