"""Which questions are classifications, and which examples have a question's own label (methods.md B.4, B.8)."""

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from llmr_ray.data.example_tasks import owner_of, pool_of
from llmr_ray.frames import frame_of


def classifications(queries: pa.Table) -> set[str]:
    """The data sets whose queries all have the same options: their answers are labels.

    Args:
        queries: columns dataset and options.
    """
    columns = frame_of(queries, ["dataset", "options"])
    options = pl.col("options")
    of_set = columns.group_by("dataset").agg(one=options.n_unique() == 1, given=options.is_not_null().all())
    return set(of_set.filter(pl.col("one") & pl.col("given"))["dataset"])


def right_labels(queries: pa.Table) -> pl.DataFrame:
    """The right option of each query that has one: query_id and label.

    Args:
        queries: columns query_id, options and gold_option.
    """
    columns = frame_of(queries, ["query_id", "options", "gold_option"])
    label = pl.col("options").list.get(pl.col("gold_option"), null_on_oob=True).str.strip_chars()
    return columns.select("query_id", label=label).drop_nulls()


def is_own_example(document: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    """Whether a document is an example of the query's kind: of its data set, or of the one whose test it is.

    Args:
        document: a row of `corpus`; its `meta` names the data set that it was made from.
        query: a row of `queries`.
    """
    return owner_of(document["meta"]) == pool_of(query["dataset"])


def has_other_label(document: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    """Whether an example of the query's kind ends in another label than the query's right option.

    An example's label is its last line, because its input may have several. Without a right option there is none to
    compare with.

    Args:
        document: see is_own_example; `text` holds the example.
        query: a row of the queries of a classification, with options and gold_option.
    """
    if query["gold_option"] is None:
        return False
    label = str(query["options"][query["gold_option"]]).strip()
    return str(document["text"]).rpartition("\n")[2].strip() != label
