"""Several LLMs that label: what they hold together, who said what, and what the report tells of them."""

import dataclasses

import pyarrow as pa
import pytest

from llmr_ray import loading
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, LLMConfig
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.evaluation.annotators import compared
from llmr_ray.labeling.consensus import ANNOTATIONS, NO_CONSENSUS, consensus_spec, run_consensus, together
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.schemas import table_of


def said(label=None, evidence="", error=None, **fields):
    kind = {"kind": "label", "scorer_id": "s", "num_prompt_tokens": 1, "num_target_tokens": 0, "truncated": False}
    return kind | {"prompt_sha": "", "label": label, "evidence": evidence, "flags": [], "error": error} | fields


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((1.0, 1.0, 0.0), 1.0),
        ((1.0, 0.0), None),  # one of two is no majority
        ((0.5, 0.0, 1.0), None),
        ((None, 1.0, 1.0), 1.0),  # who gave no label has no vote
        ((None, 0.5), 0.5),
    ],
)
def test_a_label_needs_a_majority_of_those_who_gave_one(labels, expected):
    row = together({f"a{n}": said(label) for n, label in enumerate(labels)}, 0.6)
    assert (row["label"], row["error"]) == (expected, None if expected is not None else NO_CONSENSUS)


def test_the_evidence_is_that_of_one_who_gave_the_label():
    """Prevents a label with the words of an annotator who denied it."""
    row = together({"a": said(0.0), "b": said(1.0, "quote", flags=["f"]), "c": said(1.0, "other")}, 0.6)
    assert (row["label"], row["evidence"], row["flags"]) == (1.0, "quote", ["f"])
    nobody = together({"a": said(error="cut short"), "b": said(error="no json")}, 0.6)
    assert nobody["error"] == "cut short"


def scores(root, name, labels):
    artifact = Artifact(root, ArtifactSpec(stage="score", version=1, config={"of": name}, inputs={}))
    artifact.begin()
    rows = [
        said(label, query_id=f"q{n // 2}", doc_id=f"d{n}", error=None if label is not None else "refused")
        for n, label in enumerate(labels)
    ]
    for shard in range(2):
        part = rows[2 * shard : 2 * shard + 2]
        artifact.write_shard(
            shard, {"llm_scores": table_of("llm_scores", part)}, Counts(rows_in=len(part), ok=len(part))
        )
    artifact.commit(2, seconds=0, extra={"scorer_id": name})
    return artifact


def test_every_pair_is_accounted_for_and_who_said_what_is_kept(tmp_path):
    config = dataclasses.replace(Config(), labeling=AdaptiveConfig())
    told = {"llm": scores(tmp_path, "x", [1.0, 0.0, 1.0, None]), "other": scores(tmp_path, "y", [1.0, 0.0, 0.0, 0.5])}
    artifact = Artifact(tmp_path, consensus_spec(config, told))
    artifact.begin()
    run_consensus(config, artifact, told)
    labels = {row["doc_id"]: row["label"] for row in artifact.read("llm_scores").to_pylist()}
    assert labels == {"d0": 1.0, "d1": 0.0, "d2": None, "d3": 0.5}
    counts = artifact.require()["counts"]
    assert (counts["rows_in"], counts["ok"], counts["quarantined"]) == (4, 3, {NO_CONSENSUS: 1})
    kept = {(row["doc_id"], row["annotator"]): row["label"] for row in artifact.read("annotations").to_pylist()}
    assert len(kept) == 8
    assert (kept["d2", "llm"], kept["d2", "other"], kept["d3", "llm"]) == (1.0, 0.0, None)
    (artifact.path / "manifest.json").unlink()
    run_consensus(config, artifact, told)
    assert artifact.require()["counts"] == counts


def test_annotators_of_other_candidates_are_refused(tmp_path):
    one, other = scores(tmp_path, "x", [1.0, 0.0, 1.0, 0.0]), scores(tmp_path, "y", [1.0, 0.0, 1.0])
    config = Config()
    artifact = Artifact(tmp_path, consensus_spec(config, {"llm": one, "other": other}))
    artifact.begin()
    with pytest.raises(DataError, match="were not asked about"):
        run_consensus(config, artifact, {"llm": one, "other": other})


def test_the_report_tells_of_agreement_and_of_quality():
    labels = {"a": [1, 1, 0, 0, 0.5], "b": [1, 0, 0, 0, None]}
    rows = [("q", f"d{n}", name, label) for name, of_a in labels.items() for n, label in enumerate(of_a)]
    table = pa.Table.from_pylist([dict(zip(ANNOTATIONS.names, row, strict=True)) for row in rows], ANNOTATIONS)
    told = compared(table, {("q", "d0"), ("q", "d1")}, samples=50, seed=0)
    [pair] = told["pairs"]
    # Equal in 3 of 4; by chance in 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert (pair["n"], pair["equal"], pair["kappa"]) == (4, 0.75, pytest.approx(0.5))
    assert 0 < told["alpha"] < 1
    quality = {row["annotator"]: (row["n"], row["precision"]["mean"], row["recall"]["mean"]) for row in told["quality"]}
    assert quality == {"a": (5, pytest.approx(2 / 3), 1.0), "b": (4, 1.0, 0.5)}
    # From 0.5 on "a" finds three, two of them relevant: right in 4 of 5, by chance in 3/5 * 2/5 + 2/5 * 3/5 = 0.48.
    beyond_chance = {row["annotator"]: (row["relevant"], row["kappa"]) for row in told["quality"]}
    assert beyond_chance == {"a": (0.4, pytest.approx(0.32 / 0.52)), "b": (0.5, pytest.approx(0.5))}
    alone = compared(table.slice(0, 5), set(), samples=50, seed=0)
    assert alone == {"pairs": [], "alpha": None, "quality": []}


def test_other_llms_read_as_the_first_does_but_for_what_they_say_themselves():
    """Prevents annotators from being shown half of each passage because only the model was named."""
    asked = ["llm.chat_template=true", "annotators.big.model=x", "reader.model=y", "reader.max_model_tokens=512"]
    config = loading.load("conf/arl2.yaml", asked)
    assert config.llm != LLMConfig(model=config.llm.model, chat_template=True)
    assert config.annotators["big"] == dataclasses.replace(config.llm, model="x")
    assert config.reader == dataclasses.replace(config.llm, model="y", max_model_tokens=512)
    # Another model never answers as an endpoint's of another name.
    behind = ["llm.engine=openai", "llm.endpoint=http://h", "llm.endpoint_model=a", "annotators.big.model=x"]
    with pytest.raises(ConfigError, match=r"annotators\.big\.endpoint"):
        loading.load("conf/arl2.yaml", behind)
    said = loading.load("conf/arl2.yaml", [*behind, "annotators.big.engine=vllm"]).annotators["big"]
    assert (said.endpoint, said.endpoint_model) == ("", "")
    chat = ["engine=openai_chat", "endpoint=http://h", "endpoint_model=a"]
    chats = loading.load("conf/arl2.yaml", [f"annotators.big.{setting}" for setting in chat]).annotators["big"]
    assert (chats.model, chats.max_model_tokens) == (config.llm.model, config.llm.max_model_tokens)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["annotators.llm.model=x"], "Rename"),
        (["annotators.Big-one.model=x"], "Rename"),
        (["annotators.big.model=x", "labeling.annotator=gold"], "in the place of all LLMs"),
        (["annotators.big.model=x", "tasks.qa.score.feedback=rank", "labeling.enabled=false"], "LLMs that label"),
        (["annotators.big.engine=openai", "annotators.big.model=x"], "annotators.big.endpoint"),
        (["annotators.big.engine=openai", "annotators.big.endpoint_model=x"], "Set annotators.big.model"),
        (["reader.dtype=auto"], "Set reader.model"),
    ],
)
def test_annotators_that_cannot_be_are_told_before_anything_runs(overrides, why):
    with pytest.raises(ConfigError, match=why):
        loading.load("conf/arl2.yaml", overrides)
