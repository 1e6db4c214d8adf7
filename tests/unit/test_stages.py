"""Which stages a configuration has: rounds that build on each other, and what each stage is given."""

import dataclasses
import json

import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import (
    ComparedEmbedder,
    Config,
    DatasetConfig,
    EvaluateConfig,
    LLMConfig,
    RewardModelConfig,
    RuntimeConfig,
    TaskConfig,
    TaskMine,
    TaskScore,
    TaskTrain,
)
from llmr_ray.errors import DataError
from llmr_ray.labeling.settings import AdaptiveConfig, TaskQuestions
from llmr_ray.stages import StagePlan

CONFIG = Config(
    name="test",
    datasets={"boolq": DatasetConfig(task="icl", source="icl", path="data", num_train=4)},
    tasks={
        "icl": TaskConfig(
            score=TaskScore(feedback="likelihood"),
            mine_again=TaskMine(num_dense=9),
            train=TaskTrain(positive="teacher", kl_weight=1.0),
        )
    },
)


def plan(tmp_path, **changes):
    config = dataclasses.replace(CONFIG, runtime=RuntimeConfig(artifact_root=str(tmp_path)), **changes)
    names = ("data", config.embedder.model, config.llm.model, "teacher", "other")
    assets = {name: Asset(name=name, kind="model", path=tmp_path, fingerprint=f"of {name}") for name in names}
    return {stage.name: stage for stage in StagePlan(config, assets, "llm", "reader").stages}


def test_a_round_is_mined_by_the_embedder_of_the_one_before(tmp_path):
    """Prevents rounds that repeat the first one, and a second round that starts from trained weights."""
    stages = plan(tmp_path, rounds=3)
    for before, number in (("_1", "_2"), ("_2", "")):
        mined = stages[f"mine{number}"].artifact.spec
        assert mined.inputs["embeddings"] == stages[f"embed_trained{before}"].artifact.id
        assert mined.config["tasks"]["icl"]["num_dense"] == 9
    assert stages["mine_1"].artifact.spec.inputs["embeddings"] == stages["embed_base"].artifact.id
    assert stages["mine_1"].artifact.spec.config["tasks"]["icl"]["num_dense"] != 9
    bases = {stages[f"train{number}"].artifact.spec.inputs["base"] for number in ("_1", "_2", "")}
    assert bases == {f"of {CONFIG.embedder.model}"}
    assert len({stage.artifact.id for stage in stages.values()}) == len(stages)


def test_every_round_is_evaluated_beside_those_before(tmp_path):
    stages = plan(tmp_path, rounds=2)
    asked = [stages[name].artifact.spec.config["evaluate"]["methods"][-2:] for name in ("evaluate_1", "evaluate")]
    assert asked == [["base", "round_1"], ["round_1", "trained"]]
    of_first = {name for name in stages["evaluate"].artifact.spec.inputs if name.startswith("index")}
    assert of_first == {"index_base", "index_round_1", "index_trained"}


def test_one_round_has_the_artifacts_it_always_had(tmp_path):
    """Prevents paid feedback from being asked for again because rounds exist now."""
    names = [stage.partition("_")[0] for stage in plan(tmp_path)]
    order = ["prepare", "embed", "index", "leakage", "mine", "score", "reward", "group", "train", "embed", "index"]
    assert names == [*order, "evaluate"]


@pytest.mark.parametrize("model", ["", "teacher"])
def test_the_embedder_learns_from_the_reward_model_where_there_is_one(tmp_path, model):
    stages = plan(tmp_path, reward_model=RewardModelConfig(model=model))
    source = "teach" if model else "reward"
    assert stages["group"].artifact.spec.inputs["rewards"] == stages[source].artifact.id
    assert ("agree" in stages) == bool(model)


def test_an_embedder_that_is_only_compared_has_its_own_instructions(tmp_path):
    """Prevents a peer that is measured with instructions it was not trained with, and artifacts that change by it."""
    other = ComparedEmbedder(model="other", pooling="cls", query_instructions={"icl": "query: "})
    tasks = {"icl": dataclasses.replace(CONFIG.tasks["icl"], query_instruction="ours: ", document_instruction="ours: ")}
    evaluate = EvaluateConfig(methods=["base", "E5", "trained"], embedders={"E5": other, "unused": other})
    stages, without = plan(tmp_path, tasks=tasks, evaluate=evaluate), plan(tmp_path, tasks=tasks)
    spec = stages["embed_E5"].artifact.spec
    assert (spec.inputs["embedder"], spec.config["pooling"]) == ("of other", "cls")
    assert spec.config["instructions"] == {"icl": ["query: ", ""]}
    assert stages["evaluate"].artifact.spec.inputs["index_E5"] == stages["index_E5"].artifact.id
    assert set(stages) - set(without) == {"embed_E5", "index_E5"}
    assert [name for name in without if stages[name].artifact.id != without[name].artifact.id] == ["evaluate"]


def test_how_tokens_are_pooled_changes_what_is_made_by_it_alone(tmp_path):
    """Prevents vectors of two kinds under one id, and old artifacts under new ones."""
    before = plan(tmp_path)
    spec = before["embed_base"].artifact.spec
    limits = {"pooling", "max_query_tokens", "max_document_tokens", "precision", "instructions", "shard_rows"}
    assert set(spec.config) == limits
    assert set(before["train"].artifact.spec.config) == {
        *("seed", "train", "pooling", "max_query_tokens", "max_document_tokens", "precision", "tasks", "prompts")
    }
    assert before["index_base"].artifact.spec.config == {}
    for change in ({"similarity": "dot"}, {"pool_instruction": False}):
        after = plan(tmp_path, embedder=dataclasses.replace(CONFIG.embedder, **change))
        changed = [name for name in before if before[name].artifact.id != after[name].artifact.id]
        assert changed == [name for name in before if name not in ("prepare", "leakage")]
        for stage in ("embed_base", "train"):
            config = before[stage].artifact.spec.config
            assert after[stage].artifact.spec.config == config | change
    assert after["index_base"].artifact.spec.config == {}
    dot = plan(tmp_path, embedder=dataclasses.replace(CONFIG.embedder, similarity="dot"))
    assert dot["index_trained"].artifact.spec.config == {"similarity": "dot"}


def test_a_table_of_baselines_costs_what_is_compared(tmp_path):
    """Prevents evaluations that are done again because a row was added to a table that they do not use."""
    one, other = ComparedEmbedder(model="other"), ComparedEmbedder(model="another", similarity="dot")
    few = plan(tmp_path, evaluate=EvaluateConfig(methods=["base", "E5"], embedders={"E5": one}))
    many = plan(tmp_path, evaluate=EvaluateConfig(methods=["base", "E5"], embedders={"A": other, "E5": one}))
    assert [stage.artifact.id for stage in few.values()] == [stage.artifact.id for stage in many.values()]


def test_another_llm_may_read_than_the_one_whose_feedback_trains(tmp_path):
    """Prevents rankings by one LLM that are judged by it where another was asked for."""
    same, apart = plan(tmp_path), plan(tmp_path, reader=LLMConfig(model="other"))
    assert [name for name in same if same[name].artifact.id != apart[name].artifact.id] == ["evaluate"]
    assert apart["evaluate"].artifact.spec.inputs["llm"] == "of other"
    assert (apart["score"].inputs["client"], apart["evaluate"].inputs["client"]) == ("llm", "reader")


@pytest.mark.parametrize("annotator", ["llm", "gold"])
def test_rounds_of_labelling_build_on_the_labels_before(tmp_path, annotator):
    """Prevents a round that forgets paid labels, and groups made of what was mined instead of what was labelled."""
    stages = plan(tmp_path, rounds=2, labeling=AdaptiveConfig(enabled=True, annotator=annotator))
    assert "labels" not in stages["select_1"].artifact.spec.inputs
    for stage in ("select", "label"):
        assert stages[stage].artifact.spec.inputs["labels"] == stages["label_1"].artifact.id
    assert stages["select"].artifact.spec.inputs["embeddings"] == stages["embed_trained_1"].artifact.id
    assert stages["score"].artifact.spec.inputs["candidates"] == stages["select"].artifact.id
    of_group = stages["group"].artifact.spec.inputs
    assert of_group["candidates"] == stages["select"].artifact.id
    assert of_group["rewards"] == stages["label"].artifact.id
    assert ("llm" in stages["score"].artifact.spec.inputs) == (annotator == "llm")
    assert "reward" not in stages


def test_what_graded_labels_teach_is_part_of_their_ids_alone(tmp_path, monkeypatch):
    """Prevents a correction of the list-wise loss from training all other embedders again."""
    graded = {"icl": dataclasses.replace(CONFIG.tasks["icl"], train=TaskTrain(positive="teacher", pairwise_weight=1.0))}

    def trained():
        return plan(tmp_path)["train"].artifact.id, plan(tmp_path, tasks=graded)["train"].artifact.id

    before = trained()
    monkeypatch.setattr("llmr_ray.training.stage.GRADED_VERSION", 99)
    after = trained()
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)


def test_policies_of_labelling_share_the_first_round(tmp_path):
    """A comparison of policies must start from the same labels, and train on them once."""
    one, other = (
        plan(tmp_path, rounds=2, labeling=AdaptiveConfig(enabled=True, policy=policy))
        for policy in ("adaptive", "random")
    )
    assert [name for name in one if one[name].artifact.id == other[name].artifact.id] == [
        *(
            "prepare",
            "embed_base",
            "index_base",
            "leakage",
            "mine_1",
            "select_1",
            "score_1",
            "label_1",
            "group_1",
            "train_1",
        ),
        *("embed_trained_1", "index_trained_1", "evaluate_1", "mine"),
    ]


def test_inputs_that_are_not_finished_are_named(tmp_path):
    """Prevents a stage that is run alone from reading half an artifact."""
    stages = plan(tmp_path)
    with pytest.raises(DataError, match=r"prepare/"):
        stages["mine"].require_inputs()
    assert isinstance(stages["mine"].inputs["prepare"], Artifact)


def test_several_annotators_label_the_same_pairs_and_their_consensus_counts(tmp_path):
    """Prevents labels of the first annotator alone from training where several were asked and paid."""
    config = dataclasses.replace(
        CONFIG,
        runtime=RuntimeConfig(artifact_root=str(tmp_path)),
        labeling=AdaptiveConfig(enabled=True),
        annotators={"big": LLMConfig(model="other")},
        rounds=2,
    )
    names = ("data", config.embedder.model, config.llm.model, "other")
    assets = {name: Asset(name=name, kind="model", path=tmp_path, fingerprint=f"of {name}") for name in names}
    plan = StagePlan(config, assets, "llm", annotators={"big": (assets["other"], "the other LLM")})
    stages = {stage.name: stage for stage in plan.stages}
    for number in ("_1", ""):
        one, other, both = (stages[f"{name}{number}"] for name in ("score", "score_big", "consensus"))
        assert (one.inputs["client"], other.inputs["client"]) == ("llm", "the other LLM")
        assert other.artifact.spec.inputs["candidates"] == one.artifact.spec.inputs["candidates"]
        assert other.artifact.spec.inputs["llm"] == "of other"
        assert stages[f"label{number}"].artifact.spec.inputs["llm_scores"] == both.artifact.id
    qa = dataclasses.replace(config, **QA, **asking())
    stages = {
        stage.name: stage
        for stage in StagePlan(qa, assets, "llm", annotators={"big": (assets["other"], "the other LLM")}).stages
    }
    assert [stages[name].inputs["client"] for name in ("canary", "canary_big")] == ["llm", "the other LLM"]
    assert stages["canary_big"].artifact.spec.inputs["llm"] == "of other"


QA = {
    "datasets": {"hotpotqa": DatasetConfig(task="qa", source="hotpotqa", path="data", num_train=4)},
    "labeling": AdaptiveConfig(enabled=True),
    "rounds": 2,
}


def asking(**questions):
    task = TaskConfig(score=TaskScore(feedback="label"), train=TaskTrain(positive="teacher", listwise_weight=1.0))
    return {"tasks": {"qa": dataclasses.replace(task, questions=TaskQuestions(**questions))}}


def test_without_generated_questions_every_artifact_is_what_it_was(tmp_path):
    """Prevents paid labels from being asked for again because questions can be generated now."""
    without, off = plan(tmp_path, **QA, **asking()), plan(tmp_path, **QA, **asking(temperature=0.1, num_clusters=3))
    assert "generate" not in without
    assert {name: stage.artifact.id for name, stage in off.items()} == {
        name: stage.artifact.id for name, stage in without.items()
    }
    assert without["mine_1"].artifact.spec.inputs["prepare"] == without["prepare"].artifact.id
    for name, stage in without.items():
        assert "questions" not in json.dumps(stage.artifact.spec.identity), name


def test_generated_questions_take_the_place_of_what_was_prepared(tmp_path):
    """Prevents a stage that reads only the given questions, and data that is prepared again for other questions."""
    stages = plan(tmp_path, **QA, **asking(num_documents=5))
    assert list(stages)[:3] == ["prepare", "generate", "embed_base"]
    assert stages["generate"].inputs["client"] == "llm"
    generate = stages["generate"].artifact
    read = {name: stage.artifact.spec.inputs.get("prepare") for name, stage in stages.items()}
    assert read.pop("generate") == stages["prepare"].artifact.id
    assert set(read.values()) == {generate.id, None}
    assert {name for name, read_by in read.items() if read_by is None} >= {"prepare", "index_base", "train"}
    assert read["mine"] == read["label"] == read["embed_trained"] == read["evaluate"] == generate.id
    other = plan(tmp_path, **QA, **asking(num_documents=5, demonstrations="drawn"))
    assert [name for name in stages if stages[name].artifact.id == other[name].artifact.id] == ["prepare"]
