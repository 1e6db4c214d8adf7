"""From what the retrievers found to a query's candidates: gold first, then each retriever's best, nothing twice.

Released miners compare an integer with the whole list of gold positions, so that only their comparison of texts removes
anything (methods.md A.3). Here gold documents are recognised by id and by text.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmr_ray.artifacts import seed_of
from llmr_ray.index.topk import MISSING

RANDOM_SPARE = 64
"""Random documents drawn beyond those wanted, to replace the ones that other sources took or that are excluded."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one source offers a query, best first.

    source: "given", "dense", "bm25" or "random". num: how many candidates it may add. rows: corpus rows, MISSING ones
    are passed over. scores: retrieval scores (NaN: the data gives none), or None where the source has none. skip_top:
    this many of the best are left out, whatever they are (a document's rank counts from 1 in the retriever's own list).
    """

    source: str
    num: int
    rows: np.ndarray
    scores: np.ndarray | None = None
    skip_top: int = 0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate: its corpus row, the source that found it first, and rank (from 1) and score there."""

    row: int
    source: str
    rank: int | None = None
    retrieval_score: float | None = None


def text_key(text: str) -> str:
    """What two texts share when they count as equal: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def union(
    *,
    gold_rows: Iterable[int],
    self_row: int | None,
    query: str,
    found: Iterable[Found],
    key_of: Callable[[int], str],
    skip_same_input: bool = False,
) -> tuple[list[Candidate], Counter[str]]:
    """The candidates of one query.

    Gold documents come first, all of them. Then each source in the order given adds up to `num` documents that are
    not there yet; a document found twice belongs to the source that comes first, and the later source goes on to its
    next best, so the number of candidates does not depend on how far the sources agree.

    Args:
        gold_rows: rows of documents with positive relevance, most relevant first.
        self_row: the row of the query's own document, which would give the answer away; never a candidate.
        query: the query's text.
        found: sources in order of precedence.
        key_of: the `text_key` of a corpus row.
        skip_same_input: pass over documents that begin with the query (LLM-R, methods.md B.3).

    Returns:
        The candidates, and how many documents were passed over, by reason: "self", "self_text", "gold_text" (the text
        of a gold document under another id: a false negative), "candidate_text", "query_text", "same_input" and
        "skip_top".
    """
    candidates = [Candidate(row=row, source="gold") for row in dict.fromkeys(gold_rows)]
    taken = {candidate.row for candidate in candidates}
    # The reason of a text's exclusion is the first that holds.
    texts: dict[str, str] = {}
    for candidate in candidates:
        texts.setdefault(key_of(candidate.row), "gold_text")
    if self_row is not None:
        texts.setdefault(key_of(self_row), "self_text")
    query_key = text_key(query)
    texts.setdefault(query_key, "query_text")
    excluded: Counter[str] = Counter()
    for source in found:
        added = 0
        for position, row in enumerate(source.rows.tolist()):
            if added == source.num:
                break
            if row == MISSING or row in taken:
                continue
            key = key_of(row)
            if row == self_row:
                excluded["self"] += 1
            elif position < source.skip_top:
                excluded["skip_top"] += 1
            elif key in texts:
                excluded[texts[key]] += 1
            elif skip_same_input and key.startswith(query_key + " "):
                excluded["same_input"] += 1
            else:
                ranked = source.scores is not None
                candidates.append(
                    Candidate(
                        row=row,
                        source=source.source,
                        rank=position + 1 if ranked else None,
                        retrieval_score=_score_at(source.scores, position),
                    )
                )
                taken.add(row)
                texts[key] = "candidate_text"
                added += 1
    return candidates, excluded


def _score_at(scores: np.ndarray | None, position: int) -> float | None:
    return None if scores is None or np.isnan(scores[position]) else float(scores[position])


def own_first(
    rows_QK: np.ndarray, scores_QK: np.ndarray, own: Sequence[str], owners: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """What was found, examples of the query's own data set before all others, otherwise in order (LLM-R, B.3).

    Args:
        rows_QK: corpus rows, MISSING ones last.
        scores_QK: of these.
        own: each query's data set.
        owners: for each corpus row the data set that it is an example of, if any.
    """
    is_other_QK = np.asarray(
        [[row == MISSING or owners[row] != name for row in rows] for rows, name in zip(rows_QK, own, strict=True)]
    ).reshape(rows_QK.shape)
    order_QK = np.argsort(is_other_QK, axis=1, kind="stable")
    return np.take_along_axis(rows_QK, order_QK, axis=1), np.take_along_axis(scores_QK, order_QK, axis=1)


def draw_random(start: int, end: int, num: int, seed: int, query_id: str) -> Found:
    """Documents drawn from rows [start, end) without replacement, in an order that only (seed, query_id) decides.

    Args:
        start: first row of the query's range.
        end: the row after its last.
        num: random candidates wanted.
        seed: the run's seed.
        query_id: the query.
    """
    rng = np.random.default_rng(seed_of(seed, "random_candidates", query_id))
    size = min(end - start, 2 * num + RANDOM_SPARE) if num else 0
    rows = rng.choice(end - start, size=size, replace=False) + start if size else np.zeros(0, np.int64)
    return Found(source="random", num=num, rows=rows)
