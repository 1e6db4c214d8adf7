"""What each method puts before the LLM: how varied it is, and of examples how many have the question's own label.

A retriever that shows the same few documents to many queries has learned which documents are good ones more than which
suit the query; such documents are called hubs (Radovanovic et al., JMLR 2010). In a classification a small LLM answers
as its demonstrations do, so that the share of those with the question's label says how an accuracy came about; label by
label, because a retriever that shows one label's examples to all questions has a fair share on average.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact
from llmr_ray.data.example_labels import classifications, has_other_label, is_own_example, right_labels
from llmr_ray.evaluation.leakage import POOL_TASKS
from llmr_ray.frames import PAIR, frame_of


def shown_figures(prepare: Artifact, evaluate: Artifact) -> list[dict[str, Any]]:
    """For each data set whose queries share a pool, and each method that shows documents, in order of the methods:

    dataset, method, n (prompts), documents (shown, over all prompts), different (documents among them), commonest
    (share of the prompts that show the commonest one), characters (mean length of a document), own_label (share of
    the documents that are examples of the question's kind and label; None where there are no labels) and by_label (for
    each right label: label, n prompts and own_label; empty where there are none).

    Args:
        prepare, evaluate: finished artifacts of a run.
    """
    queries = prepare.read("queries")
    pooled = queries.filter(pc.is_in(queries["task"], value_set=pa.array(POOL_TASKS)))
    asked = frame_of(evaluate.read("answers"), ["query_id", "dataset", "method", "doc_ids"])
    asked = asked.filter(pl.col("dataset").is_in(pooled["dataset"].unique().to_pylist()))
    pairs = asked.filter(pl.col("doc_ids").list.len() > 0).explode("doc_ids").rename({"doc_ids": "doc_id"})
    if pairs.is_empty():
        return []
    documents = prepare.read("corpus", columns=["doc_id", "text", "meta"], ids=pairs["doc_id"].unique())
    lengths = frame_of(documents, ["doc_id", "text"]).select("doc_id", characters=pl.col("text").str.len_chars())
    pairs = pairs.join(lengths, on="doc_id", how="left", maintain_order="left")
    pairs = pairs.join(_own_labels(pairs, pooled, documents), on=PAIR, how="left", maintain_order="left")
    by_label = _by_label(pairs, pooled)
    of_method = pairs.group_by("dataset", "method", maintain_order=True).agg(
        n=pl.col("query_id").n_unique(),
        documents=pl.len(),
        different=pl.col("doc_id").n_unique(),
        commonest=pl.col("doc_id").value_counts().struct.field("count").max() / pl.col("query_id").n_unique(),
        characters=pl.col("characters").mean(),
        own_label=pl.col("own_label").mean(),
    )
    rows = of_method.sort("dataset", maintain_order=True).to_dicts()
    return [row | {"by_label": by_label.get((row["dataset"], row["method"]), [])} for row in rows]


def _own_labels(pairs: pl.DataFrame, queries: pa.Table, documents: pa.Table) -> pl.DataFrame:
    """Of the pairs of classifications, whether the document has the query's label: query_id, doc_id, own_label."""
    labelled = classifications(queries)
    chosen = pairs.filter(pl.col("dataset").is_in(labelled)).select(PAIR).unique(maintain_order=True)
    asked = queries.filter(pc.is_in(queries["query_id"], value_set=pa.array(chosen["query_id"].unique(), pa.string())))
    query_of, document_of = _by_id(asked, "query_id"), _by_id(documents, "doc_id")
    has_label = [
        is_own_example(document_of[doc_id], query_of[query_id])
        and not has_other_label(document_of[doc_id], query_of[query_id])
        for query_id, doc_id in chosen.iter_rows()
    ]
    return chosen.with_columns(own_label=pl.Series(has_label, dtype=pl.Boolean))


def _by_label(pairs: pl.DataFrame, queries: pa.Table) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """For each data set and method, right label by label: label, n (prompts) and own_label (share of the documents)."""
    labelled = pairs.filter(pl.col("own_label").is_not_null()).join(right_labels(queries), on="query_id")
    means = labelled.group_by("dataset", "method", "label").agg(
        n=pl.col("query_id").n_unique(), own_label=pl.col("own_label").mean()
    )
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in means.sort("dataset", "method", "label").iter_rows(named=True):
        found.setdefault((row.pop("dataset"), row.pop("method")), []).append(row)
    return found


def _by_id(table: pa.Table, key: str) -> Mapping[str, dict[str, Any]]:
    return {row[key]: row for row in table.to_pylist()}
