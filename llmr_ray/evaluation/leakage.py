"""Test queries that training, or the documents that a query may retrieve, already hold: exact and near copies.

Pure: texts in, rows out. Only the test queries are kept in memory; everything they are compared with passes by once.

Two texts are the same where their normalised words are (labeling/questions.py drops generated questions by the same
normalisation). They are near where the sets of their character 3-grams have a Jaccard index of NEAR at the least, found
by MinHash LSH (datasketch) and then computed, so that no near copy is an estimate. Near texts with other numbers ("the
1994 World Cup", "the 1998 World Cup") are told apart: templates make many, and they are other questions.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasketch import MinHash, MinHashLSH

from llmr_ray.artifacts import sha256_text
from llmr_ray.data.example_tasks import owner_of
from llmr_ray.evaluation.answers import normalize
from llmr_ray.mining.candidates import text_key

LEAKAGE_VERSION = 2
"""Raised whenever what counts as a copy changes; part of what determines the artifact."""

NEAR = 0.8
"""Jaccard index from which two texts are near copies."""

NGRAM = 3
"""Characters of a piece of text whose sets are compared. Of 5, a letter changed in a question of 40 is below NEAR."""

BANDS, ROWS = 21, 6
"""MinHash LSH finds a pair of Jaccard index s with the probability 1 - (1 - s ** ROWS) ** BANDS: 0.998 at NEAR, 0.99999
at 0.9. What it proposes is computed."""

WINDOW = 4
"""Words by which a query is looked for inside a document; shorter queries are not looked for, and counted."""

SAME_TEXT, NEAR_TEXT = "same_text", "near_text"
OTHER_NUMBERS, IN_DOCUMENT = "other_numbers", "in_document"
KINDS = (SAME_TEXT, NEAR_TEXT, IN_DOCUMENT, OTHER_NUMBERS)
"""How a test query may be held elsewhere, the gravest first."""

EXAMPLE_TASKS = ("icl",)
"""Tasks whose documents are solved examples, so that one with a test query's input gives its answer away."""

PASSAGE_TASKS = ("qa", "convsearch", "tool")
"""Tasks whose queries share one pool of other documents. A copy there is counted apart, for it need be no leak: a
passage that holds a question and its answer is what retrieval for questions is to find."""

POOL_TASKS = EXAMPLE_TASKS + PASSAGE_TASKS
"""Tasks whose documents are compared, with the test queries that may retrieve them. Of the others a query retrieves its
own past, which may repeat."""

TRAINING, EXAMPLE, PASSAGE = "training", "document", "passage"
"""Where a copy is: a training query, a document that is an example, or one of a pool of other documents."""

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("dataset", pa.string()),
        ("where", pa.string()),
        ("other_id", pa.string()),
        ("other_dataset", pa.string()),
        ("kind", pa.string()),
        ("similarity", pa.float64()),
        # Of documents: whether one of the query's desired outputs stands there too.
        ("with_answer", pa.bool_()),
    ]
)
"""Of every test query and each data set that holds a copy, the gravest copy of a shard."""

_DIGITS = re.compile(r"\d+")


def normal(text: str) -> str:
    """The form in which texts are compared: NFKC, no case, ASCII punctuation or articles; the text's key where nothing
    but these is in it."""
    key = text_key(text)
    return normalize(key) or key


def grams(text: str) -> frozenset[int]:
    """32-bit hashes of a normalised text's character n-grams; of the whole text where it is shorter."""
    data = [text[start : start + NGRAM] for start in range(max(1, len(text) - NGRAM + 1))]
    return frozenset(zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in data)


def numbers_in(text: str) -> list[str]:
    """Runs of digits, sorted."""
    return sorted(_DIGITS.findall(text))


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """The share of what either has that both have."""
    return len(one & other) / len(one | other)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A test query that is looked for."""

    query_id: str
    dataset: str
    task: str
    pool: str
    text: str
    targets: tuple[str, ...] = ()

    @cached_property
    def normal(self) -> str:
        """Its text as texts are compared."""
        return normal(self.text)

    @cached_property
    def words(self) -> list[str]:
        """Of the normalised text."""
        return self.normal.split()

    @cached_property
    def numbers(self) -> list[str]:
        """Those in it."""
        return numbers_in(self.normal)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A text with a copy of a probe."""

    probe: Probe
    kind: str
    similarity: float


class Probes:
    """All test queries, ready to be looked for in one text after another.

    Args:
        probes: the test queries.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = list(probes)
        self._same: dict[str, list[int]] = defaultdict(list)
        self._starts: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._near = MinHashLSH(params=(BANDS, ROWS), num_perm=BANDS * ROWS)
        self._blank = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=_itself, scheme="affine32")
        self.pools = {probe.pool for probe in self.probes if probe.task in POOL_TASKS}
        for number, probe in enumerate(self.probes):
            self._same[probe.normal].append(number)
            if probe.pool in self.pools and len(probe.words) >= WINDOW:
                self._starts[tuple(probe.words[:WINDOW])].append(number)
        # Equal texts stand for each other: the index holds each once.
        self._most = 0
        for text in self._same:
            pieces = grams(text)
            self._most = max(self._most, len(pieces))
            self._near.insert(text, self._signature(pieces))

    def copies(self, text: str) -> list[Held]:
        """The probes of which a text is a copy: the same, near, or near but for its numbers."""
        own = normal(text)
        found = [Held(probe=self.probes[number], kind=SAME_TEXT, similarity=1.0) for number in self._same.get(own, [])]
        if self._is_longer(own):
            return found
        pieces = grams(own)
        numbers = numbers_in(own)
        for other in sorted(self._near.query(self._signature(pieces))):
            if other == own or (similarity := jaccard(pieces, grams(other))) < NEAR:
                continue
            for number in self._same[other]:
                probe = self.probes[number]
                kind = NEAR_TEXT if probe.numbers == numbers else OTHER_NUMBERS
                found.append(Held(probe=probe, kind=kind, similarity=similarity))
        return found

    def contained(self, text: str) -> list[Held]:
        """The probes of POOL_TASKS whose words stand in a text in a row."""
        words = normal(text).split()
        numbers: dict[int, None] = {}
        for place in range(len(words) - WINDOW + 1):
            for number in self._starts.get(tuple(words[place : place + WINDOW]), []):
                wanted = self.probes[number].words
                if words[place : place + len(wanted)] == wanted:
                    numbers[number] = None
        return [Held(probe=self.probes[number], kind=IN_DOCUMENT, similarity=1.0) for number in numbers]

    def _is_longer(self, text: str) -> bool:
        """Whether a normalised text's beginning alone has too many pieces to be near any probe: most passages are told
        so at a fraction of the price."""
        begins = text[: 4 * self._most]
        return len({begins[start : start + NGRAM] for start in range(len(begins) - NGRAM + 1)}) * NEAR > self._most

    def _signature(self, pieces: frozenset[int]) -> MinHash:
        signature = self._blank.copy()
        signature.update_batch(pieces)
        return signature


def rows_of_query(probes: Probes, query: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a training query (a row of `queries`) gives away, as rows of SCHEMA."""
    return [
        _row(held, TRAINING, query["query_id"], query["dataset"], with_answer=None)
        for held in probes.copies(query["query"])
    ]


def rows_of_document(probes: Probes, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a document (a row of `corpus`) holds of the test queries that may retrieve it, as rows of SCHEMA. Of an
    example the last line is its output, the rest its input; of other documents all is compared."""
    text, pool, is_example = document["text"], document["pool"], document["task"] in EXAMPLE_TASKS
    found = probes.copies(text.rsplit("\n", 1)[0] if is_example else text)
    known = {held.probe.query_id for held in found if held.kind != OTHER_NUMBERS}
    found += [held for held in probes.contained(text) if held.probe.query_id not in known]
    found = [held for held in found if held.probe.pool == pool]
    if not found:
        return []
    around = f" {normal(text)} "
    return [
        _row(
            held,
            EXAMPLE if is_example else PASSAGE,
            document["doc_id"],
            owner_of(document["meta"]) or pool,
            with_answer=any(f" {normal(target)} " in around for target in held.probe.targets),
        )
        for held in found
    ]


def gravest(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each test query and place (training queries, examples or passages of a data set) the gravest copy, in a fixed
    order."""
    best: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = row["query_id"], row["where"], row["other_dataset"]
        if key not in best or _gravity(row) < _gravity(best[key]):
            best[key] = row
    return [dict(best[key]) for key in sorted(best)]


def leakage_figures(
    found: pa.Table, queries: pa.Table, removed: Mapping[str, int], corpus: pa.Table | None = None, *, shown: int = 2
) -> dict[str, Any]:
    """What results.json says of leakage.

    Args:
        found: rows of SCHEMA, of all shards.
        queries: the table `queries`.
        removed: what `prepare` had left out before, by reason.
        corpus: where texts of documents are looked up for the examples; None: no document is shown.
        shown: examples of each place and kind, the first by a hash of both ids.

    Returns:
        training: for each test data set n (its test queries), the number of them with a copy among all training
        queries, by kind (each counts once, by its gravest), and `by_dataset`, the same for each data set that trains;
        documents: for each test data set of examples the same over the documents that its queries may retrieve,
        with_answer (of those with a copy other than `other_numbers`) and too_short (queries not looked for inside
        documents); passages: the same for those of PASSAGE_TASKS; not_compared: the test data sets whose documents were
        compared with nothing; removed; examples.
    """
    test = queries.filter(pc.equal(queries["split"], "test"))
    sizes = Counter(test["dataset"].to_pylist())
    task_of = dict(zip(queries["dataset"].to_pylist(), queries["task"].to_pylist(), strict=True))
    rows = gravest(found.to_pylist())
    short = Counter(
        dataset
        for dataset, text in zip(test["dataset"].to_pylist(), test["query"].to_pylist(), strict=True)
        if task_of[dataset] in POOL_TASKS and len(normal(text).split()) < WINDOW
    )
    told: dict[str, list[dict[str, Any]]] = {"training": [], "documents": [], "passages": []}
    for dataset, number in sorted(sizes.items()):
        mine = [row for row in rows if row["dataset"] == dataset]
        told["training"].append({"dataset": dataset, "n": number, **_counted(mine, TRAINING)})
        if task_of[dataset] in POOL_TASKS:
            is_example = task_of[dataset] in EXAMPLE_TASKS
            answered = {row["query_id"] for row in mine if row["with_answer"] and row["kind"] != OTHER_NUMBERS}
            row = {"dataset": dataset, "n": number, **_counted(mine, EXAMPLE if is_example else PASSAGE)}
            row |= {"with_answer": len(answered), "too_short": short[dataset]}
            told["documents" if is_example else "passages"].append(row)
    return {
        **told,
        "not_compared": sorted(dataset for dataset in sizes if task_of[dataset] not in POOL_TASKS),
        "removed": dict(removed),
        "examples": _examples(rows, queries, corpus, shown),
    }


def _counted(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    here = [row for row in rows if row["where"] == where]
    datasets = sorted({row["other_dataset"] for row in here})
    by_dataset = {name: _kinds([row for row in here if row["other_dataset"] == name]) for name in datasets}
    return {"kinds": _kinds(here), "by_dataset": by_dataset}


def _kinds(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Test queries by the gravest kind of copy."""
    first: dict[str, str] = {}
    for row in sorted(rows, key=_gravity):
        first.setdefault(row["query_id"], row["kind"])
    counts = Counter(first.values())
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _examples(
    rows: Sequence[Mapping[str, Any]], queries: pa.Table, corpus: pa.Table | None, shown: int
) -> list[dict[str, Any]]:
    by_kind: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: sha256_text(row["query_id"] + "\n" + row["other_id"])):
        by_kind[row["where"], row["kind"]].append(row)
    places = sorted(by_kind, key=lambda key: (key[0], KINDS.index(key[1])))
    chosen = [row for key in places for row in by_kind[key][:shown]]
    texts = _texts(queries, "query_id", "query", [row["query_id"] for row in chosen])
    others = _texts(queries, "query_id", "query", [row["other_id"] for row in chosen if row["where"] == TRAINING])
    if corpus is not None:
        others |= _texts(corpus, "doc_id", "text", [row["other_id"] for row in chosen if row["where"] != TRAINING])
    return [
        {**row, "text": texts[row["query_id"]], "other_text": others[row["other_id"]]}
        for row in chosen
        if row["other_id"] in others
    ]


def _texts(table: pa.Table, key: str, column: str, ids: Sequence[str]) -> dict[str, str]:
    wanted = table.filter(pc.is_in(table[key], value_set=pa.array(ids, pa.string())))
    return dict(zip(wanted[key].to_pylist(), wanted[column].to_pylist(), strict=True))


def _row(held: Held, where: str, other_id: str, other_dataset: str, *, with_answer: bool | None) -> dict[str, Any]:
    return {
        "query_id": held.probe.query_id,
        "dataset": held.probe.dataset,
        "where": where,
        "other_id": other_id,
        "other_dataset": other_dataset,
        "kind": held.kind,
        "similarity": held.similarity,
        "with_answer": with_answer,
    }


def _gravity(row: Mapping[str, Any]) -> tuple[int, bool, float, str]:
    return KINDS.index(row["kind"]), not row["with_answer"], -row["similarity"], row["other_id"]


def _itself(value: int) -> int:
    return value
