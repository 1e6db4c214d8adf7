"""Queries whose rows hold their candidates as texts: positives, negatives and what a teacher said of each.

That is how LLM-Embedder, FlagEmbedding, Tevatron and DPR publish training data (methods.md H.1, H.4). Texts become
documents that are known by their id or, without one, by what they say, so that a passage of many rows is one document.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmr_ray.artifacts import sha256_text
from llmr_ray.data.records import Bad, BadRow, Document, Query, Record, Skip, Source, check_text, one_line
from llmr_ray.data.text import document_text


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A candidate as a row names it: by a text, by an id, or by its row in the corpus (from 0), as far as they are
    given."""

    text: Any = None
    title: Any = None
    identity: str | None = None
    row: int | None = None


def text_id(text: str) -> str:
    """What documents without an id are known by."""
    return sha256_text(text)[:16]


def whole_text(text: Any, title: Any, max_chars: int) -> str:
    """A document's text with its title; BadRow where it cannot be used."""
    body = check_text(text, "text", max_chars).strip()
    return document_text(one_line(check_text(title, "title", max_chars)) if title else None, body)


class Passages:
    """The documents of a data set as they turn up.

    Args:
        source: the data set.
        prefix: before ids; None: the data set's name.
    """

    def __init__(self, source: Source, prefix: str | None = None) -> None:
        self.source = source
        self.limit = source.config.max_text_chars
        self._prefix = source.name if prefix is None else prefix
        self._digests: dict[str, str] = {}
        self._rows: list[str | None] = []

    def __len__(self) -> int:
        return len(self._digests)

    def corpus_row(self, where: str, row: dict[str, Any] | Bad) -> Record:
        """A row of the corpus: a document, or what is wrong with it. Call it for every row, so that rows count right.

        A row that says what an earlier one said is skipped: of rows without an id one with that text, of others one
        with that text under that id. A text under two ids stays two documents, because judgements name either.
        """
        self._rows.append(None)
        if isinstance(row, Bad):
            return row
        try:
            # A text's own name for it, in the order in which formats have them.
            text = row.get("text", row.get("contents"))
            identity = identity_of(row, ("docid", "doc_id", "_id"))
            doc_id, document = self.taken(Passage(text=text, title=row.get("title"), identity=identity))
        except BadRow as bad:
            return bad.at(where)
        self._rows[-1] = doc_id
        return Skip(row=where, reason="repeated_text") if document is None else document

    def check(self, passage: Passage) -> None:
        """BadRow if a passage cannot be used: for its text, unknown_document or other_text_of_id."""
        self._find(passage)

    def taken(self, passage: Passage) -> tuple[str, Document | None]:
        """A passage's document, which is handed out where it is new; BadRow if the passage cannot be used.

        Its own text counts before its row of the corpus: texts were written with the row, numbers may be of another
        corpus.
        """
        doc_id, new = self._find(passage)
        if new is None:
            return doc_id, None
        text, self._digests[doc_id] = new
        return doc_id, Document(doc_id=doc_id, pool=self.source.name, text=text)

    def _find(self, passage: Passage) -> tuple[str, tuple[str, str] | None]:
        """The id of a passage's document, and where it is new its text and what that is known by."""
        in_corpus = None
        if passage.row is not None and 0 <= passage.row < len(self._rows):
            in_corpus = self._rows[passage.row]
        if passage.text is None:
            if passage.identity is not None and (named := self._name(passage.identity)) in self._digests:
                return named, None
            if in_corpus is None:
                raise BadRow("unknown_document", passage.identity if passage.row is None else f"row {passage.row}")
            return in_corpus, None
        whole = whole_text(passage.text, passage.title, self.limit)
        digest = text_id(whole)
        doc_id = self._name(digest if passage.identity is None else passage.identity)
        known = self._digests.get(doc_id)
        if known is None:
            if in_corpus is not None:
                return in_corpus, None
            return doc_id, (whole, digest)
        if known != digest:
            raise BadRow("other_text_of_id", f"{passage.identity}: {whole}")
        return doc_id, None

    def _name(self, identity: str) -> str:
        # A document is named by every row that has it: one string serves all.
        return sys.intern(f"{self._prefix}:{identity}")


def identity_of(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of some fields that holds an id, as text (numbers are ids too); BadRow where it is none."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise BadRow("bad_id", value)
    return check_text(str(value), "id", 1000)


class Identities:
    """Query ids of a data set, in which rows may repeat and ids may come twice."""

    def __init__(self) -> None:
        self._contents: dict[str, list[str]] = {}

    def take(self, identity: str, content: Any) -> str | None:
        """The id under which a row goes: its own, or with a number where another row has it; None for the same row."""
        digest = text_id(repr(content))
        known = self._contents.setdefault(identity, [])
        if digest in known:
            return None
        known.append(digest)
        return identity if len(known) == 1 else f"{identity}#{len(known)}"


@dataclass(frozen=True, kw_only=True)
class RowQuery:
    """A row as all these formats say it.

    identity: its id within the data set. rewards: what a teacher said, of the positives and then of the negatives; None
    in place of one: nothing. fields: other fields of the Query.
    """

    identity: str
    split: str | None
    text: Any
    targets: tuple[str, ...] = ()
    positives: Sequence[Passage] = ()
    negatives: Sequence[Passage] = ()
    rewards: Sequence[float | None] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def query_records(passages: Passages, where: str, row: RowQuery) -> Iterator[Record]:
    """A row's new documents, what of it cannot be used, and its query.

    Positives are relevant documents, one that cannot be used costs the row; negatives are given candidates, one that
    cannot be used costs itself. A candidate that the teacher scored with NaN or infinity, or not at all, is no
    candidate; a positive stays relevant then. Of equal texts the first counts, so no negative is a positive.

    Raises:
        BadRow: what is wrong with the whole row.
    """
    source = passages.source
    text = check_text(row.text, "query", passages.limit).strip()
    for positive in row.positives:
        passages.check(positive)
    rewards = [0.0] * (len(row.positives) + len(row.negatives)) if row.rewards is None else row.rewards
    documents: dict[str, float | None] = {}
    relevant: list[str] = []
    for number, (passage, reward) in enumerate(zip([*row.positives, *row.negatives], rewards, strict=True)):
        is_positive = number < len(row.positives)
        side, place = ("positive", number) if is_positive else ("negative", number - len(row.positives))
        name = f"{where} {side} {place}"
        is_scored = is_score(reward)
        if not is_scored and not is_positive:
            yield Skip(row=name, reason="candidate_without_score")
            continue
        try:
            doc_id, document = passages.taken(passage)
        except BadRow as bad:
            yield bad.at(name)
            continue
        if document is not None:
            yield document
        if doc_id in documents:
            yield Skip(row=name, reason="repeated_candidate")
            continue
        documents[doc_id] = reward if is_scored else None
        if is_positive:
            relevant.append(doc_id)
            if not is_scored:
                yield Skip(row=name, reason="candidate_without_score")
    given = [doc_id for doc_id in documents if doc_id not in relevant]
    teacher = () if row.rewards is None else ((name, value) for name, value in documents.items() if value is not None)
    yield Query(
        query_id=f"{source.name}:{row.identity}",
        query=text,
        targets=row.targets,
        pool=source.name,
        split_key=row.identity,
        split=row.split,
        qrels=tuple((doc_id, 1) for doc_id in relevant),
        related=tuple(given),
        given=tuple((doc_id, None) for doc_id in given),
        given_rewards=tuple(teacher),
        **row.fields,
    )


def scores_of(row: dict[str, Any], name: str, number: int) -> list[float | None] | None:
    """A row's list of scores, one for each of `number` candidates; None where there is no such list.

    Raises:
        BadRow: not_a_number, scores_length.
    """
    values = row.get(name)
    if values is None or (values == [] and number):
        return None
    if not isinstance(values, list):
        raise BadRow("not_a_number", f"{name}: {values!r}")
    if len(values) != number:
        raise BadRow("scores_length", f"{name}: {len(values)} for {number} candidates")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise BadRow("not_a_number", f"{name}: {value!r}")
    return [None if value is None else float(value) for value in values]


def is_score(value: float | None) -> bool:
    """Whether a teacher said something of a candidate: neither nothing nor NaN nor infinity."""
    return value is not None and math.isfinite(value)


def texts_of(row: dict[str, Any], name: str) -> list[Any]:
    """A row's list of texts (one text counts as a list of one); none where the field is missing."""
    value = row.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise BadRow("not_text", f"{name}: {value!r}")
    return value


def answers_of(row: dict[str, Any], names: Sequence[str], max_chars: int) -> tuple[str, ...]:
    """The desired outputs of the first of some fields that has any; blank ones are left out."""
    for name in names:
        if found := [answer for answer in texts_of(row, name) if not isinstance(answer, str) or answer.strip()]:
            return tuple(check_text(answer, name, max_chars).strip() for answer in found)
    return ()
