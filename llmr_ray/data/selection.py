"""From a reader's records to the rows of `queries`, `corpus` and `qrels`: splits, sizes, and no test text in training.

Pure but for the file in which texts wait (texts.py); the order of the records does not matter (but the first of two
equal ids is the one kept). Of a document memory holds its ids and its place, so that a corpus need not fit.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from llmr_ray.artifacts import Counts
from llmr_ray.config import DatasetConfig, PrepareConfig
from llmr_ray.data.records import Bad, Document, Query, Record, duplicate_of
from llmr_ray.data.splits import SPLITS, lowest, normalized, split_of, unit_hash
from llmr_ray.data.texts import Texts
from llmr_ray.errors import DataError


class Held(NamedTuple):
    """A document without its texts, which are at a place of their file."""

    pool: str
    position: int | None
    from_query: str | None
    is_solved: bool
    place: int


@dataclass(kw_only=True)
class Collected:
    """All records of one data set, and the split of each query."""

    name: str
    config: DatasetConfig
    texts: Texts
    queries: dict[str, Query] = field(default_factory=dict)
    documents: dict[str, Held] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    rows_in: int = 0


class Chosen(NamedTuple):
    """A document of the corpus. position: None where its pool has no order."""

    doc_id: str
    pool: str
    position: int | None
    place: int
    data: Collected

    def row(self) -> dict[str, Any]:
        """Its row of `corpus`."""
        text, continuation, meta = self.data.texts.get(self.place)
        # A title stands at the head of the text, where the LLM reads it too.
        return {
            "doc_id": self.doc_id,
            "pool": self.pool,
            "position": self.position,
            "task": self.data.config.task,
            "title": None,
            "text": text,
            "continuation": continuation,
            "meta": meta,
        }


@dataclass(kw_only=True)
class Selected:
    """Rows of one data set, ready for the tables, the documents of the corpus, and their accounting.

    chosen: the queries with what is given for them, of which rows are made when they are written: `given_rows`.
    """

    queries: list[dict[str, Any]]
    chosen: list[Query]
    corpus: list[Chosen]
    qrels: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    counts: Counts


def collect(
    name: str, config: DatasetConfig, prepare: PrepareConfig, records: Iterable[Record], texts: Texts | None = None
) -> Collected:
    """Takes in a reader's records; a second row with an id already seen is bad (duplicate_id).

    Args:
        name: of the data set.
        config: its settings.
        prepare: shares of the splits, and of bad rows.
        records: in any order.
        texts: where documents' texts go; None: into a file of the system's temporary folder.

    Raises:
        DataError: more than prepare.max_bad_fraction of the rows are bad.
    """
    result = Collected(name=name, config=config, texts=texts or Texts())
    for record in records:
        result.rows_in += 1
        match record:
            case Query():
                if record.query_id in result.queries:
                    result.bad.append(duplicate_of(record))
                    continue
                result.queries[record.query_id] = replace(record, pool=config.pool) if config.pool else record
                result.split[record.query_id] = record.split or split_of(
                    name,
                    record.split_key,
                    test_fraction=prepare.test_fraction,
                    dev_fraction=prepare.dev_fraction,
                )
            case Document():
                if record.doc_id in result.documents:
                    result.bad.append(duplicate_of(record))
                else:
                    place = result.texts.put(record.text, record.continuation, _json(record.meta))
                    # One string serves all documents of a pool.
                    pool = sys.intern(config.pool or record.pool)
                    held = Held(pool, record.position, record.from_query, record.is_solved, place)
                    result.documents[record.doc_id] = held
            case Bad():
                result.bad.append(record)
            case _:
                result.skipped[record.reason] += 1
    _check_share(result, prepare.max_bad_fraction)
    return result


def held_out_texts(datasets: Iterable[Collected]) -> dict[str, set[str]]:
    """The normalised query texts of all development and test queries, by split."""
    texts: dict[str, set[str]] = {"dev": set(), "test": set()}
    for data in datasets:
        for query_id, split in data.split.items():
            if split != "train":
                texts[split].add(normalized(data.queries[query_id].query))
    return texts


def select(data: Collected, held_out: Mapping[str, set[str]]) -> Selected:
    """Chooses queries and documents.

    Queries: those of training (development) whose text is also a held-out (test) query's are dropped, those whose
    history is longer than `num_documents` too, then each split keeps its `num_*` lowest by hash. Documents: of an
    ordered pool, all that some chosen query may see; of a shared pool, those that belong to chosen queries, then the
    lowest by hash up to `num_documents`. A document made from a query is kept only if that query is for training and
    was not dropped, and a published example only if its input is no held-out query's of any data set.

    Args:
        data: the records of a data set.
        held_out: `held_out_texts` of all data sets that share pools or a task with this one.
    """
    skipped = Counter(data.skipped)
    forbidden = {"train": held_out["dev"] | held_out["test"], "dev": held_out["test"], "test": set()}
    usable: dict[str, list[str]] = {split: [] for split in SPLITS}
    for query_id, query in data.queries.items():
        split = data.split[query_id]
        if normalized(query.query) in forbidden[split]:
            skipped["duplicate_of_test"] += 1
        elif 0 < data.config.num_documents < (query.history_end or 0):
            skipped["history_too_long"] += 1
        else:
            usable[split].append(query_id)
    sizes = {"train": data.config.num_train, "dev": data.config.num_dev, "test": data.config.num_test}
    chosen_ids = set().union(*(lowest(data.name, usable[split], sizes[split]) for split in SPLITS))
    skipped["query_not_selected"] += sum(map(len, usable.values())) - len(chosen_ids)
    chosen = [data.queries[query_id] for query_id in sorted(chosen_ids)]

    documents = _documents(data, chosen, set(usable["train"]), forbidden["train"], skipped)
    kept = {document.doc_id for document in documents}
    skipped += Counter()  # drops reasons with a count of zero
    return Selected(
        queries=[_query_row(data, query, kept) for query in chosen],
        chosen=chosen,
        corpus=documents,
        qrels=[
            {"query_id": query.query_id, "doc_id": doc_id, "relevance": relevance}
            for query in chosen
            for doc_id, relevance in sorted(query.qrels)
        ],
        quarantine=[
            {"dataset": data.name, "row": bad.row, "reason": bad.reason, "excerpt": bad.excerpt} for bad in data.bad
        ],
        counts=Counts(
            rows_in=data.rows_in,
            ok=len(chosen) + len(documents),
            quarantined=Counter(bad.reason for bad in data.bad),
            skipped=skipped,
        ),
    )


def _documents(
    data: Collected, chosen: list[Query], trainable: set[str], held_out: Set[str], skipped: Counter[str]
) -> list[Chosen]:
    """The documents to keep."""
    reach: dict[str, float] = {}
    wanted: set[str] = set()
    for query in chosen:
        end = float("inf") if query.history_end is None else query.history_end
        reach[query.pool] = max(reach.get(query.pool, 0), end)
        wanted.update(doc_id for doc_id, _ in query.qrels)
        wanted.update(query.related)
        if query.self_doc_id is not None:
            wanted.add(query.self_doc_id)
    kept: list[Chosen] = []
    loose: list[Chosen] = []
    for doc_id, held in data.documents.items():
        document = Chosen(doc_id, held.pool, held.position, held.place, data)
        if held.from_query is not None and held.from_query not in trainable:
            is_test = data.split[held.from_query] != "train"
            skipped["example_of_held_out_query" if is_test else "duplicate_of_test"] += 1
        elif held.from_query is None and held.pool not in reach and not data.config.pool:
            skipped["document_of_unused_pool"] += 1
        elif held.is_solved and _solves_any(data.texts.get(held.place)[0] or "", held_out):
            skipped["example_of_held_out_query"] += 1
        elif held.position is None:
            loose.append(document)
        elif held.position < reach[held.pool]:
            kept.append(document)
        else:
            skipped["document_after_last_query"] += 1
    loose.sort(key=lambda document: (unit_hash("order", data.name, document.doc_id), document.doc_id))
    limit = data.config.num_documents or len(loose)
    room = limit - sum(document.doc_id in wanted for document in loose)
    for document in loose:
        if document.doc_id in wanted:
            kept.append(document)
        elif room > 0:
            room -= 1
            kept.append(document)
        else:
            skipped["document_not_selected"] += 1
    return kept


def _solves_any(example: str, inputs: Set[str]) -> bool:
    """Whether an example's text up to one of its line breaks is one of some normalised inputs."""
    end = example.find("\n")
    while end >= 0:
        if normalized(example[:end]) in inputs:
            return True
        end = example.find("\n", end + 1)
    return False


def _query_row(data: Collected, query: Query, kept: set[str]) -> dict[str, Any]:
    meta = dict(query.meta or {})
    if query.self_doc_id in kept:
        meta["self_doc_id"] = query.self_doc_id
    return {
        "query_id": query.query_id,
        "task": data.config.task,
        "dataset": data.name,
        "split": data.split[query.query_id],
        "split_key": query.split_key,
        "query": query.query,
        "targets": list(query.targets),
        "options": None if query.options is None else list(query.options),
        "gold_option": query.gold_option,
        "context": query.context,
        "pool": query.pool,
        "history_end": query.history_end,
        "meta": _json(meta),
    }


def given_rows(queries: Iterable[Query]) -> list[dict[str, Any]]:
    """The rows of `given` that come with some queries."""
    return [
        {"query_id": query.query_id, "doc_id": doc_id, "retrieval_score": score}
        for query in queries
        for doc_id, score in query.given
    ]


def given_reward_rows(queries: Iterable[Query]) -> list[dict[str, Any]]:
    """The rows of `given_rewards` that come with some queries."""
    return [
        {"query_id": query.query_id, "doc_id": doc_id, "reward": reward}
        for query in queries
        for doc_id, reward in query.given_rewards
    ]


def in_order(parts: Sequence[Selected]) -> Iterator[Chosen]:
    """The documents of a task's data sets by (pool, position); those of pools without an order are numbered from 0 as
    they come.

    Raises:
        DataError: two data sets have a document of one id.
    """
    by_pool: dict[str, list[Chosen]] = {}
    for part in parts:
        for document in part.corpus:
            by_pool.setdefault(document.pool, []).append(document)
    _check_ids(parts)
    for pool in sorted(by_pool):
        documents = by_pool.pop(pool)
        if any(document.position is None for document in documents):
            yield from (document._replace(position=position) for position, document in enumerate(documents))
        else:
            yield from sorted(documents, key=lambda document: document.position or 0)


def _check_ids(parts: Sequence[Selected]) -> None:
    seen: dict[str, str] = {}
    for part in parts if len(parts) > 1 else []:
        for document in part.corpus:
            first = seen.setdefault(document.doc_id, document.data.name)
            if first != document.data.name:
                raise DataError(
                    f"the data sets '{first}' and '{document.data.name}' both have a document '{document.doc_id}'. "
                    "Documents of one task need ids of their own; rename those of one of them."
                )


def _json(meta: Mapping[str, Any] | None) -> str | None:
    return json.dumps(meta, sort_keys=True, ensure_ascii=False) if meta else None


def _check_share(data: Collected, max_bad_fraction: float) -> None:
    if data.rows_in == 0:
        raise DataError(f"data set '{data.name}' holds no rows at all. Check its `path` and `source`.")
    if len(data.bad) > max_bad_fraction * data.rows_in:
        reasons = dict(Counter(bad.reason for bad in data.bad).most_common())
        first = data.bad[0]
        raise DataError(
            f"data set '{data.name}': {len(data.bad)} of {data.rows_in} rows are bad ({reasons}), more than "
            f"prepare.max_bad_fraction = {max_bad_fraction:g} allows. First: {first.row} {first.reason} "
            f"{first.excerpt!r}. Repair the data, or raise the limit if you know why."
        )
