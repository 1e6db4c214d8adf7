"""The Arrow schemas of every stage boundary, and the one check that tables pass there.

Ids are strings, scores float32. pyarrow accepts nulls in fields declared non-nullable and loses the name of a list's
child on a Parquet round trip, so a declared schema alone guards nothing: ``conform`` checks columns, types, nulls and
unique keys, and is called wherever a table enters or leaves a stage.
"""

import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.errors import DataError


def _strings() -> pa.DataType:
    return pa.list_(pa.field("element", pa.string(), nullable=False))


def _floats() -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32()))


def _field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


_S = pa.string()
_I = pa.int32()
_F = pa.float32()

PSEUDO = "pseudo"
"""reward_source of a label that the retriever gave itself (ARL2)."""

SCHEMAS: dict[str, pa.Schema] = {
    # A query may retrieve the documents of its `pool` whose `position` is below `history_end` (null: the whole pool).
    # Shared corpora are one pool; a dialogue or a long text is a pool of its own. Queries of one `split_key` (null: the
    # query_id) are too much alike for one of them to be seen in training and another to be asked.
    "queries": pa.schema(
        [
            _field("query_id", _S),
            _field("task", _S),
            _field("dataset", _S),
            _field("split", _S),
            _field("split_key", _S, nullable=True),
            _field("query", _S),
            _field("targets", _strings()),
            _field("options", _strings(), nullable=True),
            _field("gold_option", _I, nullable=True),
            _field("context", _S, nullable=True),
            _field("pool", _S),
            _field("history_end", _I, nullable=True),
            _field("meta", _S, nullable=True),
        ]
    ),
    # Rows are sorted by (pool, position), so what a query may retrieve is one contiguous range of rows. `text` is what
    # is embedded and searched; the LLM reads `text` followed by `continuation`.
    "corpus": pa.schema(
        [
            _field("doc_id", _S),
            _field("pool", _S),
            _field("position", _I),
            _field("task", _S),
            _field("title", _S, nullable=True),
            _field("text", _S),
            _field("continuation", _S, nullable=True),
            _field("meta", _S, nullable=True),
        ]
    ),
    "qrels": pa.schema([_field("query_id", _S), _field("doc_id", _S), _field("relevance", _I)]),
    # Candidates that come with the data; documents that the corpus lacks may be among them.
    "given": pa.schema([_field("query_id", _S), _field("doc_id", _S), _field("retrieval_score", _F, nullable=True)]),
    # What the makers of the data had a teacher say of such candidates (score.feedback: given).
    "given_rewards": pa.schema([_field("query_id", _S), _field("doc_id", _S), _field("reward", _F)]),
    "quarantine": pa.schema(
        [_field("dataset", _S), _field("row", _S), _field("reason", _S), _field("excerpt", _S, nullable=True)]
    ),
    "candidates": pa.schema(
        [
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("source", _S),
            _field("rank", _I, nullable=True),
            _field("retrieval_score", _F, nullable=True),
        ]
    ),
    "llm_scores": pa.schema(
        [
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("scorer_id", _S),
            _field("kind", _S),
            # Null with the reason in `error`: what failed, or the rule by which the LLM was not asked. Rows of the kind
            # "label" have `label` instead, and the checks that lowered it in `flags`.
            _field("llm_score", _F, nullable=True),
            _field("rank_without", _I, nullable=True),
            _field("rank_with", _I, nullable=True),
            _field("num_prompt_tokens", _I),
            _field("num_target_tokens", _I),
            _field("truncated", pa.bool_()),
            _field("prompt_sha", _S),
            _field("error", _S, nullable=True),
            _field("label", _F, nullable=True),
            _field("evidence", _S, nullable=True),
            _field("flags", _strings(), nullable=True),
        ]
    ),
    # Where a rule put a document below all that have a reward, it has none, and reward_source is the rule. evidence:
    # what the LLM quoted for its label.
    "rewards": pa.schema(
        [
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("reward", _F, nullable=True),
            _field("reward_source", _S),
            _field("evidence", _S, nullable=True),
        ]
    ),
    # The full candidate pool of a query; what a training step uses is sampled at batch time. roles: "gold",
    # "candidate" or "same_label" (groups.py). rewards is null for tasks trained on labels alone, and holds null for a
    # document below all that have one. weights is null where every reward weighs 1.
    "groups": pa.schema(
        [
            _field("query_id", _S),
            _field("task", _S),
            _field("dataset", _S),
            _field("query", _S),
            _field("doc_ids", _strings()),
            _field("docs", _strings()),
            _field("roles", _strings()),
            _field("rewards", _floats(), nullable=True),
            _field("weights", _floats(), nullable=True),
        ]
    ),
    # Graded labels of relevance, 0, 0.5 or 1 (ARL2). Null: the LLM was asked and gave none. confidence: of a
    # retriever's pseudo-label, the probability that it is right. evidence: what the LLM quoted for its label.
    "labels": pa.schema(
        [
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("label", _F, nullable=True),
            _field("source", _S),
            _field("round", _I),
            _field("confidence", pa.float64(), nullable=True),
            _field("evidence", _S, nullable=True),
        ]
    ),
    # What became of each pair in a round of labelling (labeling/selection.py).
    "decisions": pa.schema(
        [
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("decision", _S),
            _field("reason", _S),
            _field("probability", pa.float64()),
            _field("round", _I),
        ]
    ),
    "run": pa.schema(
        [
            _field("run_name", _S),
            _field("query_id", _S),
            _field("doc_id", _S),
            _field("rank", _I),
            _field("score", _F),
        ]
    ),
    "metrics": pa.schema(
        [
            _field("scenario", _S),
            _field("dataset", _S),
            _field("method", _S),
            _field("measure", _S),
            _field("query_id", _S),
            _field("value", pa.float64()),
            _field("stratum", _S, nullable=True),
        ]
    ),
}

LATER: dict[str, list[str]] = {
    "llm_scores": ["label", "evidence", "flags"],
    "rewards": ["evidence"],
    "labels": ["evidence"],
    "metrics": ["stratum"],
}
"""Nullable columns that came after artifacts had been written: where they are missing, all is null."""

KEYS: dict[str, list[str]] = {
    "queries": ["query_id"],
    "corpus": ["doc_id"],
    "qrels": ["query_id", "doc_id"],
    "given": ["query_id", "doc_id"],
    "given_rewards": ["query_id", "doc_id"],
    "candidates": ["query_id", "doc_id"],
    "llm_scores": ["query_id", "doc_id", "kind"],
    "rewards": ["query_id", "doc_id"],
    "groups": ["query_id"],
    "labels": ["query_id", "doc_id"],
    "decisions": ["query_id", "doc_id"],
    "run": ["run_name", "query_id", "doc_id"],
    "metrics": ["dataset", "method", "measure", "query_id"],
}


def conform(table: pa.Table, name: str) -> pa.Table:
    """Returns `table` cast to the schema `name`, columns in order, or raises DataError saying what is wrong.

    Checks: every column present and none unknown, types castable without loss, no null where none is allowed, keys
    unique.
    """
    schema = SCHEMAS[name]
    for column in LATER.get(name, []):
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, schema.field(column).type))
    missing = [field.name for field in schema if field.name not in table.column_names]
    unknown = [column for column in table.column_names if column not in schema.names]
    if missing or unknown:
        raise DataError(
            f"table '{name}': missing columns {missing}, unknown columns {unknown}. Expected {schema.names}. "
            "Write the table with the schema of llmr_ray/schemas.py."
        )
    for field in schema:
        nulls = table[field.name].null_count
        if nulls and not field.nullable:
            raise DataError(f"table '{name}': column '{field.name}' has {nulls} nulls, but may hold none.")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"table '{name}' has a column of the wrong type: {error}") from error
    for field in schema:
        if pa.types.is_floating(field.type):
            finite = pc.all(pc.is_finite(table[field.name].drop_null())).as_py()
            if finite is False:
                raise DataError(f"table '{name}': column '{field.name}' holds NaN or infinite values.")
    key = KEYS.get(name)
    if key and table.num_rows:
        counts = table.select(key).group_by(key).aggregate([([], "count_all")])
        if counts.num_rows != table.num_rows:
            twice = counts.filter(pc.greater(counts["count_all"], 1)).select(key).slice(0, 3).to_pylist()
            raise DataError(f"table '{name}': {key} must be unique, but these occur more than once: {twice}.")
    return table


def table_of(name: str, rows: list[dict[str, object]]) -> pa.Table:
    """A conforming table from row dictionaries (absent keys become null)."""
    return conform(pa.Table.from_pylist(rows, schema=SCHEMAS[name]), name)
