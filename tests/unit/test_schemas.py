"""The one check at every stage boundary catches what pyarrow lets through."""

import pyarrow as pa
import pytest

from llmr_ray.errors import DataError
from llmr_ray.schemas import LATER, SCHEMAS, conform, table_of

REWARD = {"query_id": "q", "doc_id": "d", "reward": 1.0, "reward_source": "llm"}


def test_nulls_are_refused_where_none_may_be() -> None:
    """pa.table accepts nulls in non-nullable fields; a null id would vanish in the next join."""
    with pytest.raises(DataError, match="'doc_id' has 1 nulls"):
        table_of("rewards", [REWARD, REWARD | {"doc_id": None}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_must_be_finite(value: float) -> None:
    """One NaN reward turns a whole batch's loss into NaN."""
    with pytest.raises(DataError, match="NaN or infinite"):
        table_of("rewards", [REWARD | {"reward": value}])


def test_duplicate_keys_are_named() -> None:
    """A pair that occurs twice would count twice in a softmax."""
    with pytest.raises(DataError, match="'query_id': 'q', 'doc_id': 'd'"):
        table_of("rewards", [REWARD, REWARD])


def test_missing_and_unknown_columns_are_named() -> None:
    """A misspelt column must not become a column of nulls."""
    with pytest.raises(DataError, match=r"missing columns \['reward'\], unknown columns \['rewards'\]"):
        conform(pa.table({"query_id": ["q"], "doc_id": ["d"], "rewards": [1.0], "reward_source": ["llm"]}), "rewards")


def test_columns_that_came_later_are_null_in_old_tables() -> None:
    """Scores that were paid for before labels existed must still be read."""
    table = SCHEMAS["llm_scores"].empty_table()
    old = table.drop_columns(LATER["llm_scores"])
    assert conform(old, "llm_scores").schema.names == table.schema.names
    with pytest.raises(DataError, match="kind"):
        conform(old.drop_columns(["kind"]), "llm_scores")


def test_wrong_type_is_refused() -> None:
    """Text in a numeric column must fail here, not in the middle of training."""
    with pytest.raises(DataError, match="wrong type"):
        conform(pa.table({"query_id": ["q"], "doc_id": ["d"], "reward": ["high"], "reward_source": ["llm"]}), "rewards")


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_an_empty_table_conforms(name: str) -> None:
    """A shard without rows is legal."""
    assert conform(SCHEMAS[name].empty_table(), name).num_rows == 0
