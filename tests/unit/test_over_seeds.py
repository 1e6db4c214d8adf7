"""What a study says over seeds: figures against worked numbers, and failed cells."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from llmr_ray import loading
from llmr_ray.assets import Asset
from llmr_ray.config import as_trained
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation.seeds import over_seeds
from llmr_ray.evaluation.stability import stability
from llmr_ray.stages import Stage, StagePlan
from llmr_ray.studies import Study, read_study, with_seeds
from llmr_ray.training.batches import Plan
from llmr_ray.training.stage import embedder_recipe

CONF = Path(__file__).parents[2] / "conf"


def test_an_interval_over_seeds_is_student_s():
    """Prevents three seeds from being given the interval of a thousand."""
    values = [0.40, 0.46, 0.43]
    spread = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (spread.mean, spread.low, spread.high) == pytest.approx((0.43, low, high))
    assert spread.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert over_seeds([0.4]).record() == {"mean": 0.4, "ci95": None, "sd": None, "p": None, "num_seeds": 1}
    assert [over_seeds(same).p for same in ([0.0, 0.0], [0.1, 0.1])] == [1.0, 0.0]


def test_convergence_is_where_the_running_mean_stays():
    """Prevents a loss that crosses its last value early, and leaves it again, from counting as converged there."""
    falling = [{"step": 2 * n, "task": "qa", "loss": max(0.0, 10.0 - n)} for n in range(20)]
    flat = [{"step": 2 * n + 1, "task": "icl", "loss": 1.0} for n in range(20)]
    told = {row["task"]: row for row in stability(pa.Table.from_pylist(falling + flat))}
    # Width 2: means 10, 9.5, 8.5, ... 0.5, 0; the change is 9.5, so within .95 of 0 from the mean of 1 and 0 on.
    assert told["qa"]["convergence_step"] == 20
    assert (told["qa"]["first_loss"], told["qa"]["last_loss"]) == (9.5, 0.0)
    assert told["qa"]["loss_variance"] == pytest.approx(0.25 / 10)
    assert told["qa"]["relative_noise"] is None
    assert (told["icl"]["convergence_step"], told["icl"]["relative_noise"]) == (None, 0.0)


# --- seeds -----------------------------------------------------------------------------------------------------------


def stages_of(study: Study, root: Path) -> dict[str, dict[str, Stage]]:
    """Label of each cell -> its stages by name, with models and data that are not there."""
    found = {}
    for cell in study.cells([f"runtime.artifact_root={root}"]):
        config = loading.load(study.config, cell.settings)
        names = [config.embedder.model, config.llm.model, *(dataset.path for dataset in config.datasets.values())]
        names += [config.reader.model] if config.reader else []
        names += [compared.model for compared in config.evaluate.embedders.values()]
        assets = {name: Asset(name=name, kind="model", path=root, fingerprint=f"of {name}") for name in names}
        found[cell.label] = {stage.name: stage for stage in StagePlan(config, assets, "llm", "reader").stages}
    return found


@pytest.fixture(scope="module")
def table_4(tmp_path_factory):
    study = read_study(CONF / "studies" / "llm_embedder_ablations.yaml")
    return stages_of(with_seeds(study, [42, 43]), tmp_path_factory.mktemp("table_4"))


def test_table_4_shares_what_its_variants_have_in_common(table_4):
    """Prevents a matrix that asks the LLM about the same pairs for every seed and every variant of training."""
    made = {
        name: {of[name].artifact.id for of in table_4.values()}
        for name in ("prepare", "embed_base", "mine", "score", "group", "train", "evaluate")
    }
    assert len(table_4) == 12
    numbers = {name: len(ids) for name, ids in made.items()}
    assert numbers | {"group": 0} == {
        "prepare": 1, "embed_base": 1, "mine": 1, "score": 2, "group": 0, "train": 12, "evaluate": 12
    }  # fmt: skip
    assert numbers["group"] == 2


def test_other_llms_of_one_study_share_the_training(tmp_path):
    """Prevents table 10 from training an embedder for each LLM that only reads."""
    study = read_study(CONF / "studies" / "llm_embedder_llms_paper.yaml")
    cells = stages_of(study, tmp_path)
    assert len({of["train"].artifact.id for of in cells.values()}) == 1
    assert len({of["evaluate"].artifact.id for of in cells.values()}) == len(cells)


def test_a_training_seed_is_the_run_s_where_they_are_equal(tmp_path):
    """Prevents the cell of the run's own seed from being trained again, and scoring from depending on it."""
    study = read_study(CONF / "studies" / "batching.yaml")
    path, of = study.config, {}
    for seed in ("", "train.seed=42", "train.seed=43"):
        config = loading.load(path, [seed] if seed else [])
        of[seed] = embedder_recipe(config).seed
    assert of == {"": 42, "train.seed=42": 42, "train.seed=43": 43}
    first, second = (
        stages_of(Study(name="x", title="", config=path, figures=[], variants={"a": []}, seeds=seeds), tmp_path)
        for seeds in ([], [42, 43])
    )
    assert first["a"]["train"].artifact.id == second["a, seed 42"]["train"].artifact.id
    assert first["a"]["train"].artifact.id != second["a, seed 43"]["train"].artifact.id
    assert first["a"]["score"].artifact.id == second["a, seed 43"]["score"].artifact.id


def test_without_instructions_the_trained_embedder_has_none_and_the_miner_keeps_its_own(table_4):
    """Prevents an ablation that trains without instructions and embeds with them, or pays the LLM for other pairs."""
    full, bare = table_4["full method, seed 42"], table_4["no instructions, seed 42"]
    assert bare["embed_base"].artifact.id == full["embed_base"].artifact.id
    assert set(map(tuple, bare["embed_trained"].artifact.spec.config["instructions"].values())) == {("", "")}
    assert set(bare["train"].artifact.spec.config["prompts"].values()) == {""}
    config = as_trained(loading.load(CONF / "ablations.yaml", ["train.instructions=false"]))
    assert set(embedder_recipe(config).instructions.values()) == {("", "")}


def test_batches_one_source_after_the_other():
    """Prevents an order that is said and not followed, or that loses rows."""
    rows = {"a": np.arange(8), "b": np.arange(8, 20)}
    settings = {"repeats": {}, "batch_size": 4, "batching": "homogeneous", "seed": 1}
    plan = Plan(rows, order="sequential", **settings)
    blocks = [plan.block(step) for step in range(10)]
    assert [block.dataset for block in blocks] == ["a", "a", "b", "b", "b"] * 2
    assert sorted(np.concatenate([block.rows for block in blocks[:5]])) == list(range(20))
    for override in ("train.batching=mixed", "train.mix=round_robin"):
        with pytest.raises(ConfigError, match="sequential"):
            loading.load(CONF / "ablations.yaml", ["train.order=sequential", override])


def test_a_dry_run_says_what_each_cell_would_do(tmp_path, monkeypatch, capsys):
    """Prevents a matrix of days that is started without knowing its size."""
    from typer.testing import CliRunner

    from llmr_ray.cli import app

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(CONF / "studies" / "llm_embedder_llms_paper.yaml")
    done = CliRunner().invoke(app, ["ablate", path, "--seeds", "7", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "cell 5 of 5: Llama-2-13B-Chat, seed 7: something it names is not here" in done.output
    assert CliRunner().invoke(app, ["study", path, "--seeds", "1,1", "--dry-run"]).exit_code == 2
