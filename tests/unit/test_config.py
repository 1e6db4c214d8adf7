"""The configuration refuses what it does not understand, and says what was meant."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmr_ray import loading
from llmr_ray.config import TaskConfig, TaskScore, identity
from llmr_ray.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_step=5", "train.num_steps"),
        ("tasks.qa.score.feedbak=rank", "tasks.qa.score.feedback"),
        ("train.schedule=cosine", "linear"),
        ("train.num_steps=many", "Integer"),
        ("train.num_steps=-1", "negative"),
        ("train.global_batch_size=33", "divide"),
        ("train.group_size=1", "at least 2"),
        ("train.lora.rnk=8", "train.lora.rank"),
        ("train.lora.alpha=0", "do nothing"),
        ("train.lora.dropout=1", "do nothing"),
        ("prepare.test_fraction=0.95", "leave nothing"),
        ("tasks.qa.train.top_positives=3", "go round"),
        ("tasks.qa.train.bottom_negatives=16", "go round"),
        ("reward_model.train.num_step=5", "reward_model.train.num_steps"),
        ("rounds=0", "at least 1"),
        ("tasks.qa.questions.demonstrations=none", "clustered"),
        ("tasks.qa.questions.num_clusters=0", "at least 1"),
        ("tasks.tool.questions.num_documents=5", "passages"),
        ("datasets.x.task=nonsense", "nonsense"),
        ("notasetting", "key=value"),
    ],
)
def test_wrong_settings_are_refused(override: str, message: str) -> None:
    """A misspelt or impossible setting that is silently ignored costs a whole run."""
    with pytest.raises(ConfigError, match=message):
        loading.load(CONF / "quickstart.yaml", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward_model.train.group_size=1", "at least 2"),
        ("reward_model.train.global_batch_size=15", "divide"),
        ("reward_model.train.matryoshka_dimensions=[8]", "no"),
        ("reward_model.train.temperature=0", "divided"),
        ("reward_model.top_positives=0", "at least 1"),
        ("reward_model.held_out_fraction=1", "no query"),
        ("tasks.qa.score.feedback=given", "come with the data"),
    ],
)
def test_settings_of_a_reward_model_are_checked_where_there_is_one(override: str, message: str) -> None:
    """A reward model that cannot train would be found out after the LLM was paid."""
    loading.load(CONF / "quickstart.yaml", [override])
    with pytest.raises(ConfigError, match=message):
        loading.load(CONF / "quickstart.yaml", ["reward_model.model=minilm-l6", override])


@pytest.mark.parametrize(
    "override", ["reward_form=zscore", "reward_form=minmax", "kl_direction=student_teacher", "pairwise_weight=1"]
)
def test_rules_leave_no_number_where_a_loss_needs_one(override: str) -> None:
    """Prevents a training whose first loss is not finite, hours after the LLM was paid."""
    changes = ["tasks.icl.score.same_task=true", "tasks.icl.train.kl_weight=1", f"tasks.icl.train.{override}"]
    with pytest.raises(ConfigError, match="without a reward"):
        loading.load(CONF / "quickstart.yaml", changes)
    loading.load(CONF / "quickstart.yaml", [*changes, "reward_model.model=minilm-l6"])


def test_a_reward_model_needs_feedback_to_learn_from(tmp_path: Path) -> None:
    """A run whose tasks have labels alone would end in a stage that finds no query."""
    text = "tasks: {tool: {train: {contrastive_weight: 1.0}}}\ndatasets: {x: {task: tool, num_train: 5}}\n"
    path = write(tmp_path, text)
    loading.load(path)
    with pytest.raises(ConfigError, match="to learn from"):
        loading.load(path, ["reward_model.model=minilm-l6"])


def test_layers_merge_left_to_right(tmp_path: Path) -> None:
    """Later files and overrides win, and untouched values of earlier ones stay."""
    write(tmp_path, "train: {num_steps: 7, group_size: 3}\n", "a.yaml")
    write(tmp_path, "train: {num_steps: 8}\n", "b.yaml")
    path = write(tmp_path, "base: [a.yaml, b.yaml]\nseed: 5\n")
    config = loading.load(path, ["train.learning_rate=0.1"])
    assert (config.train.num_steps, config.train.group_size, config.seed, config.train.learning_rate) == (8, 3, 5, 0.1)


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    """Two files that name each other would recurse until the interpreter dies."""
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="names itself"):
        loading.load((tmp_path / "a.yaml").resolve())


def test_broken_yaml_and_missing_file_are_clear(tmp_path: Path) -> None:
    """A parser's traceback does not tell a user which file is broken."""
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML"):
        loading.load(write(tmp_path, "train: {num_steps: [}\n"))
    with pytest.raises(ConfigError, match="no config file"):
        loading.load(tmp_path / "absent.yaml")


CONFIGS = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name != "studies")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(CONF)))
def test_every_shipped_config_loads(path: Path) -> None:
    """A config that ships but does not load is the first thing a user would meet."""
    config = loading.load(path)
    assert config.tasks or config.evaluate.embedders or "runtime" in path.parts


def test_resolved_config_loads_again(tmp_path: Path) -> None:
    """The record of a run must reproduce the run."""
    config = loading.load(CONF / "quickstart.yaml")
    assert loading.load(write(tmp_path, loading.to_yaml(config))) == config


def test_config_imports_without_heavy_libraries() -> None:
    """A laptop that only reads configs should not need (or wait for) torch, ray or vllm."""
    code = (
        "import sys, llmr_ray.config, llmr_ray.artifacts; "
        "sys.exit(int(any(m in sys.modules for m in ('torch', 'ray', 'vllm', 'transformers'))))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_that_came_later_leave_old_ids_alone() -> None:
    """An upgrade that renames every artifact pays for all LLM feedback again; a setting that is on must still count."""
    before = identity(TaskScore())
    assert "feedback" in before
    assert "same_task" not in before
    assert identity(TaskScore(same_task=True)) == before | {"same_task": True}
    assert identity(TaskConfig(score=TaskScore(same_task=True)))["score"] == before | {"same_task": True}
    assert identity({"icl": TaskScore()}) == {"icl": before}
