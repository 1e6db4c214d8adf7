"""A run's data set as MTEB sees it: its labelled queries, its pool's documents, and what MTEB could not say."""

import pytest

from llmr_ray.errors import DataError
from llmr_ray.evaluation.mteb_task import retrieval_task
from tests.unit import evaluation_world as world


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    return world.make_prepare(tmp_path_factory.mktemp("prepare"))


def test_a_task_holds_the_splits_labelled_queries_and_their_pool(prepare):
    """Documents of other data sets in the corpus, or training queries, would make figures of another task."""
    task = retrieval_task(prepare, "hotpot")
    task.load_data()
    part = task.dataset["default"]["test"]
    assert part["corpus"]["id"] == [f"hotpot-d{number}" for number in range(world.NUM_DOCUMENTS)]
    assert part["corpus"]["text"][3] == "hotpot text 3"
    assert sorted(part["queries"]["id"]) == [f"hotpot/q{number}" for number in range(8)]
    assert part["relevant_docs"] == {f"hotpot/q{number}": {f"hotpot-d{number}": 1} for number in range(8)}
    assert task.metadata.revision == prepare.id.rpartition("/")[2]


def test_a_split_is_chosen(prepare):
    task = retrieval_task(prepare, "hotpot", split="train")
    task.load_data()
    assert sorted(task.dataset["default"]["train"]["relevant_docs"]) == sorted(f"hotpot/q{n}" for n in range(8, 12))


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("piqa", "test", "no labelled queries of 'piqa'"),
        ("hotpot", "dev", "in the split dev"),
        ("hotpott", "test", "It has queries of austen, bfcl, "),
        ("bfcl_memory", "test", "documents of their own"),
    ],
)
def test_what_is_no_task_of_mteb_is_refused(prepare, dataset, split, message):
    """A dialogue's turns searched by every query would be another, easier or harder, task under the same name."""
    with pytest.raises(DataError, match=message):
        retrieval_task(prepare, dataset, split=split)
