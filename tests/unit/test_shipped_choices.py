"""Choices in conf/ that hold only as long as other numbers there do: counted, not believed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmr_ray import loading
from llmr_ray.config import Config
from llmr_ray.studies import read_study
from llmr_ray.training.groups import Pool, sample

CONF = Path(__file__).parents[2] / "conf"
CUTTING = [path for path in sorted((CONF / "studies").glob("*.yaml")) if "icl_cut" in path.read_text()]


def test_runs_whose_data_sets_take_turns_stop_at_whole_turns() -> None:
    """Prevents a data set more or less, after which intervals cut a turn and some data sets are seen once more."""
    train = loading.load(CONF / "many_tasks.yaml").train
    trained = [data for data in loading.load(CONF / "many_tasks.yaml").datasets.values() if data.num_train]
    assert (train.mix, train.batch_by, len(trained)) == ("round_robin", "dataset", 20)
    study = read_study(CONF / "studies" / "self_pacing.yaml")
    settings = [loading.load(study.config, cell.settings).train for cell in replace(study, seeds=[42]).cells([])]
    for train in settings:
        steps = (train.num_steps, train.self_paced_interval, train.checkpoint_interval)
        assert [number % len(trained) for number in steps] == [0, 0, 0]


@pytest.mark.parametrize("path", CUTTING, ids=lambda path: path.stem)
def test_a_variant_of_what_is_cut_first_has_something_to_cut(path: Path) -> None:
    """Prevents a variant that equals its reference by construction, and is read as "makes no difference"."""
    study = replace(read_study(path), seeds=[42])
    for cell in study.cells([]):
        config = loading.load(study.config, cell.settings)
        shown = config.evaluate.icl_demonstration_tokens or float("inf")
        if config.evaluate.icl_cut != "least_similar":
            assert config.evaluate.icl_demonstrations * shown > config.llm.max_model_tokens, cell.label


@pytest.mark.parametrize("name", ["released.yaml", "paper/llm_embedder_released.yaml", "paper/llm_embedder_v1.yaml"])
def test_the_released_examples_draw_one_of_three_positives(name: str) -> None:
    """Prevents a policy for labels, which examples lack, from falling back to the single best (methods A.6.3)."""
    config = loading.load(CONF / name)
    task, size = config.tasks["icl"], config.tasks["icl"].mine.num_bm25 + config.tasks["icl"].mine.num_dense
    rewards = -np.arange(size, dtype=np.float32)
    pool = Pool(keys=np.arange(size), is_gold=np.zeros(size, bool), rewards=rewards)
    drawn = [
        sample(
            pool,
            size=config.train.group_size,
            positive=task.train.positive,
            negatives=task.train.negatives,
            rng=np.random.default_rng(turn),
            top_positives=task.train.top_positives,
            turn=turn,
        )[0]
        for turn in range(12)
    ]
    assert {int(places[0]) for places in drawn} == {0, 1, 2}
    for places in drawn:
        # None of the three is a negative, and no negative stands there twice.
        assert not {0, 1, 2} & set(places[1:].tolist())
        assert len(set(places.tolist())) == config.train.group_size


def variants(name: str) -> dict[str, Config]:
    study = replace(read_study(CONF / "studies" / f"{name}.yaml"), seeds=[42])
    return {cell.variant: loading.load(study.config, cell.settings) for cell in study.cells([])}


def trained_tasks(config: Config) -> set[str]:
    return {data.task for data in config.datasets.values() if data.num_train}


def test_a_variant_without_a_scenario_trains_on_none_of_its_data_sets() -> None:
    """Prevents data sets that a configuration gained from training in a variant that says it leaves their kind out."""
    found = variants("scenarios")
    left_out = {"no knowledge": {"qa"}, "no memory": {"chat", "lrlm"}, "no examples": {"icl"}, "no tools": {"tool"}}
    everything = trained_tasks(found["all scenarios"])
    assert everything == set().union(*left_out.values())
    for variant, tasks in left_out.items():
        assert trained_tasks(found[variant]) == everything - tasks, variant
    labels = variants("reward_types")["labels of the data"]
    assert {labels.tasks[task].score.feedback for task in trained_tasks(labels)} == {"none"}


def test_batches_of_other_sizes_see_as_many_queries() -> None:
    """Prevents twice the training from being read as the gain of a smaller batch."""
    seen = {name: each.train.global_batch_size * each.train.num_steps for name, each in variants("batching").items()}
    assert len(set(seen.values())) == 1, seen
