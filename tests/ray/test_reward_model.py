"""The reward model from the LLM's rewards to rewards of its own, under Ray."""

import numpy as np
import pytest
import torch

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.assets import Asset
from llmr_ray.config import (
    Config,
    DatasetConfig,
    RewardModelConfig,
    RuntimeConfig,
    TaskConfig,
    TaskScore,
    TaskTrain,
    TrainConfig,
)
from llmr_ray.evaluation.agreement import rank_agreement
from llmr_ray.feedback.jobs import feedback_tasks
from llmr_ray.modeling.cross_encoder import CrossEncoder
from llmr_ray.modeling.embedder import fingerprint_of
from llmr_ray.schemas import table_of
from llmr_ray.training.pairs import is_held_out
from llmr_ray.training.reward_model import FILE, TeachWorker, reward_model_spec, run_reward_model, run_teach, teach_spec
from llmr_ray.training.stage import group_spec, run_group
from tests.tiny import tiny_bert
from tests.training_setup import groups_table

pytestmark = pytest.mark.ray

FEEDBACK = ("chat", "icl", "lrlm")


def finished(root, stage, *shards):
    """A committed artifact of some shards, each the rows of its tables."""
    artifact = Artifact(root, ArtifactSpec(stage=stage, version=1, config={}, inputs={}))
    artifact.begin()
    for shard, tables in enumerate(shards):
        content = {name: table_of(name, rows) for name, rows in tables.items()}
        artifact.write_shard(shard, content, Counts(rows_in=1, ok=1))
    artifact.commit(len(shards), seconds=0)
    return artifact


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """A configuration, the inputs of both stages (candidates in two shards, one query of them unrewarded), a base."""
    tmp_path = tmp_path_factory.mktemp("reward")
    rows = groups_table(num_queries=40, tasks=(*FEEDBACK, "tool")).to_pylist()
    corpus = [
        {"doc_id": doc_id, "pool": "p", "position": place, "task": row["task"], "text": doc}
        for row in rows
        for place, (doc_id, doc) in enumerate(zip(row["doc_ids"], row["docs"], strict=True))
    ]
    queries = [
        {key: row[key] for key in ("query_id", "task", "dataset", "query")}
        | {"split": "train", "targets": [row["query"]], "pool": "p"}
        for row in rows
    ]
    candidates = [
        [{"query_id": row["query_id"], "doc_id": doc_id, "source": "given"} for doc_id in row["doc_ids"]]
        for row in rows
    ]
    rewards = [
        {"query_id": row["query_id"], "doc_id": doc_id, "reward": reward, "reward_source": "llm"}
        for row in rows[1:]
        for doc_id, reward in zip(row["doc_ids"], row["rewards"] or [], strict=False)
    ]
    tables = {"queries": queries, "corpus": corpus, "qrels": []}
    train = TrainConfig(
        num_steps=60,
        global_batch_size=16,
        group_size=4,
        learning_rate=3e-3,
        temperature=1.0,
        batching="mixed",
        self_paced=False,
        checkpoint_interval=20,
        dropout=False,
    )
    config = Config(
        name="test",
        seed=11,
        datasets={f"{task}-set": DatasetConfig(task=task, num_train=40) for task in (*FEEDBACK, "tool")},
        tasks={
            task: TaskConfig(
                score=TaskScore(feedback="none" if task == "tool" else "likelihood"),
                train=TaskTrain(positive="teacher", negatives="lowest", top_positives=2, kl_weight=1.0)
                if task != "tool"
                else TaskTrain(contrastive_weight=1.0),
            )
            for task in (*FEEDBACK, "tool")
        },
        reward_model=RewardModelConfig(
            model="tiny",
            max_tokens=24,
            precision="float32",
            top_positives=1,
            bottom_negatives=4,
            held_out_fraction=0.3,
            train=train,
        ),
        runtime=RuntimeConfig(train_workers=1, run_root=str(tmp_path / "runs")),
    )
    folder = tiny_bert(tmp_path / "base")
    inputs = {
        "prepare": finished(tmp_path, "prepare", tables),
        "candidates": finished(
            tmp_path,
            "mine",
            {"candidates": [pair for of in candidates[:70] for pair in of]},
            {"candidates": [pair for of in candidates[70:] for pair in of]},
        ),
    }
    llm = finished(tmp_path, "reward", {"rewards": rewards})
    return config, inputs, llm, Asset("tiny", "local", folder, fingerprint_of(folder)), tmp_path


@pytest.fixture(scope="module")
def taught(local_ray, problem):
    """The artifacts of both stages."""
    config, inputs, llm, base, root = problem
    made = {**inputs, "rewards": llm, "base": base}
    model = Artifact(root, reward_model_spec(config, **made))
    model.begin()
    run_reward_model(config, model, **made)
    given = {**inputs, "reward_model": model}
    artifact = Artifact(root, teach_spec(config, **given))
    artifact.begin()
    run_teach(config, artifact, **given)
    return model, artifact


def test_the_reward_model_says_what_it_learned_from(problem, taught):
    """Prevents held-out queries from training it, and queries from being lost without a word."""
    model, _ = taught
    queries = problem[1]["prepare"].read("queries").to_pylist()
    held_out = {row["query_id"] for row in queries if is_held_out(row, 0.3)}
    rewarded = {row["query_id"] for row in queries if row["task"] in FEEDBACK}
    counts = model.require()["counts"]
    assert counts["skipped"]["task_without_feedback"] == 40
    assert counts["skipped"]["held_out"] == len(rewarded & held_out)
    assert counts["ok"] + counts["skipped"].get("no_rewards", 0) == len(rewarded - held_out)
    assert set(model.read("groups")["query_id"].to_pylist()) <= rewarded - held_out
    losses = model.read("steps")["loss"].to_numpy()
    assert losses[-10:].mean() < losses[:10].mean()
    assert model.require()["extra"]["warnings"] == []
    assert not (model.path / "work").exists()


def test_every_candidate_has_the_reward_of_its_own_pair(problem, taught):
    """Prevents rewards that went to other pairs: read anew by transformers' own tokenizer, one by one."""
    model, artifact = taught
    prepare = problem[1]["prepare"]
    rewards, counts = artifact.read("rewards"), artifact.require()["counts"]
    assert counts["ok"] == rewards.num_rows == 120 * 6
    assert counts["skipped"] == {"task_without_feedback": 40 * 6}
    assert set(rewards["reward_source"].to_pylist()) == {"reward_model"}
    teacher = CrossEncoder(model.file(FILE), max_tokens=24, precision="float32", device="cpu")
    texts = {row["doc_id"]: row["text"] for row in prepare.read("corpus").to_pylist()}
    asked = {row["query_id"]: f"{row['query']}\n{row['targets'][0]}" for row in prepare.read("queries").to_pylist()}
    for row in rewards.to_pylist()[::83]:
        pair = (asked[row["query_id"]], texts[row["doc_id"]])
        ids = teacher.tokenizer(*pair, truncation="longest_first", max_length=24)["input_ids"]
        assert row["reward"] == pytest.approx(float(teacher.score([ids], 64)[0]), abs=1e-4)


def test_it_ranks_as_the_llm_does_also_where_it_did_not_train(problem, taught):
    """Prevents a teacher that learned nothing, or its queries by heart."""
    config, inputs, llm, base, root = problem
    _, artifact = taught
    CrossEncoder(base.path, max_tokens=24, precision="float32", device="cpu").save(root / "fresh")
    untrained = by_hand(config, root / "untrained", inputs, artifact.spec, root / "fresh")
    before, after = (rank_agreement(of.read("rewards"), llm.read("rewards")) for of in (untrained, artifact))
    held_out = {row["query_id"]: is_held_out(row, 0.3) for row in inputs["prepare"].read("queries").to_pylist()}
    for which in (False, True):
        queries = [query for query in after if held_out[query] == which]
        assert len(queries) > 20
        assert np.mean([after[query] for query in queries]) > np.mean([before[query] for query in queries]) + 0.1


def test_its_rewards_take_the_place_of_the_llm_s(problem, taught):
    """Prevents a table that the stage group cannot join, or that leaves documents without a reward."""
    config, inputs, _, _, root = problem
    given = {**inputs, "rewards": taught[1]}
    groups = Artifact(root, group_spec(config, **given))
    groups.begin()
    run_group(config, groups, **given)
    assert groups.require()["counts"]["ok"] >= 120
    assert groups.require()["extra"]["documents_without_reward"] == 0


def test_the_same_bytes_in_whatever_order_the_shards_are_done(problem, taught):
    """Prevents rewards that depend on which actor took which shard."""
    config, inputs, _, _, root = problem
    model, artifact = taught
    again = by_hand(config, root / "again", inputs, artifact.spec, model.file(FILE))
    assert again.require()["files"] == artifact.require()["files"]


def by_hand(config, root, inputs, spec, model):
    """The stage teach with the model in a folder, last shard first, in this process."""
    artifact = Artifact(root, spec)
    artifact.begin()
    torch.set_num_threads(config.runtime.encode_threads)
    worker = TeachWorker(
        artifact,
        **inputs,
        model=model,
        tasks=feedback_tasks(config),
        settings=config.reward_model,
        seed=config.seed,
        batch_tokens=config.runtime.encode_batch_tokens,
    )
    for shard in (1, 0):
        worker.run(shard)
    artifact.commit(2, seconds=0)
    return artifact
