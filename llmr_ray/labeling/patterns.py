"""Which questions stand before a document as demonstrations: like it, and of different patterns (methods.md C.1.2).

A pattern is a question whose names, numbers and quotations are placeholders, so that its vector tells what is asked
rather than about whom. No language model is needed: a name is a run of capitalised words.

Legend: N questions, M documents, D dimensions, K clusters.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
from sklearn.cluster import KMeans

from llmr_ray.artifacts import seed_of

ENTITY, NUMBER, QUOTE = "[entity]", "[number]", "[quote]"

_QUOTED = re.compile(r"\"[^\"]+\"|“[^”]+”|«[^»]+»|(?<!\w)'[^']+'(?!\w)|(?<!\w)‘[^’]+’(?!\w)")
_NUMBER = re.compile(r"(?<![\w\[])[$€£]?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?%?(?!\w)")
_WORD = re.compile(r"\[\w+\]|\b(?:\w|Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof)\.(?=\s*\w)|\w+(?:[-.'’&]\w+)*|[^\w\s]")
_POSSESSIVE = re.compile(r"['’]s$")
_JOINING = frozenset({"of", "the", "de", "del", "der", "di", "du", "la", "le", "van", "von", "al", "&"})
_OPENING = re.compile(
    "an?|the|who|whom|whose|what|which|when|where|why|how|is|are|was|were|am|be|do|does|did|has|have|had|can|could|will|"
    "would|shall|should|may|might|must|if|in|on|at|by|for|from|of|to|with|under|after|before|during|between|among|as|"
    "about|into|since|until|according|name|list|give|tell|identify|find|state|describe|explain|define|choose|select|"
    "please|and|or|but|not|this|that|these|those|there|it|its|he|she|they|his|her|their|i|you|your|we|our|my",
    re.IGNORECASE,
)
"""Words that are no names though they may begin a sentence, and "I"."""


_PASSES = 10
"""Of splitting and merging, which could otherwise go on for ever."""


def mask(question: str) -> str:
    """The question's pattern: quoted strings, numbers, and runs of capitalised words as placeholders.

    A run goes on over words such as "of" between two names. What begins a sentence is a name unless it is one of a list
    of English words that questions open with; a language that capitalises all nouns has them all masked.
    """
    text = _NUMBER.sub(NUMBER, _QUOTED.sub(QUOTE, question))
    pieces, end = [], 0
    for start, stop in _entities(text):
        pieces += [text[end:start], ENTITY]
        end = stop
    return " ".join("".join([*pieces, text[end:]]).split())


def _entities(text: str) -> Iterator[tuple[int, int]]:
    """Where names stand in a text: begin and end of each run."""
    words = list(_WORD.finditer(text))
    place = 0
    while place < len(words):
        first = last = place
        place += 1
        word = words[first].group()
        if not word[0].isupper() or _OPENING.fullmatch(word):
            continue
        # Within a run any capital will do: "World War I", "Lord Of The Rings".
        while place < len(words) and not _POSSESSIVE.search(words[last].group()):
            word = words[place].group()
            if word[0].isupper():
                last = place
            elif word not in _JOINING:
                break
            place += 1
        place, begin = last + 1, words[first].start()
        yield begin, begin + len(_POSSESSIVE.sub("", text[begin : words[last].end()]))


def cluster(
    vector_ND: np.ndarray, *, num_clusters: int = 10, split_above: float = 0.0, merge_below: float = 0.0, seed: int
) -> np.ndarray:
    """Clusters of patterns by k-means on unit vectors: int64 [N], numbered in the order in which they occur.

    With limits of width and distance the number of clusters follows the patterns (ISODATA, Ball and Hall 1965): wide
    clusters are split in two, and of near ones the nearest are merged, until none is left or _PASSES are over.

    Args:
        vector_ND: vectors of the patterns, of any length but 0.
        num_clusters: at the most, or to begin with where there are limits; equal patterns are never parted.
        split_above: mean squared distance of a cluster's vectors to their mean above which it is split; 0: never.
        merge_below: distance of two means below which the clusters are merged; 0: never.
        seed: of the run.
    """
    unit_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
    num_clusters = min(num_clusters, len(np.unique(unit_ND, axis=0)))
    number_N = _means(unit_ND, num_clusters, seed)
    for _ in range(_PASSES if split_above or merge_below else 0):
        changed_N = _merged(unit_ND, _split(unit_ND, number_N, split_above, seed), merge_below)
        if _numbered(changed_N).tolist() == _numbered(number_N).tolist():
            break
        number_N = changed_N
    return _numbered(number_N)


def _means(unit_ND: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    means = KMeans(num_clusters, n_init=1, random_state=seed_of(seed, "patterns") % 2**32)
    return np.asarray(means.fit_predict(unit_ND), np.int64)


def _numbered(number_N: np.ndarray) -> np.ndarray:
    """The same clusters, numbered in the order in which they occur."""
    _, first, number_N = np.unique(number_N, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number_N]


def _split(unit_ND: np.ndarray, number_N: np.ndarray, above: float, seed: int) -> np.ndarray:
    """Every cluster that is wider than `above` in two."""
    number_N = number_N.copy()
    for name in np.unique(number_N) if above else ():
        rows = np.flatnonzero(number_N == name)
        own_ND = unit_ND[rows]
        if ((own_ND - own_ND.mean(axis=0)) ** 2).sum(axis=1).mean() > above:
            number_N[rows] = np.where(_means(own_ND, 2, seed) == 1, number_N.max() + 1, name)
    return number_N


def _merged(unit_ND: np.ndarray, number_N: np.ndarray, below: float) -> np.ndarray:
    """Clusters whose means are nearer than `below` as one, the nearest two first."""
    while below and len(names := np.unique(number_N)) > 1:
        mean_KD = np.stack([unit_ND[number_N == name].mean(axis=0) for name in names])
        distance_KK = np.linalg.norm(mean_KD[:, None] - mean_KD, axis=2)
        np.fill_diagonal(distance_KK, np.inf)
        one, other = np.unravel_index(np.argmin(distance_KK), distance_KK.shape)
        if distance_KK[one, other] >= below:
            break
        number_N = np.where(number_N == names[other], names[one], number_N)
    return number_N


def choose_demonstrations(
    doc_ids: Sequence[str],
    document_MD: np.ndarray,
    question_ids: Sequence[str],
    question_ND: np.ndarray,
    cluster_N: np.ndarray,
    passages: Sequence[Collection[str]],
    *,
    seed: int,
    nearest: int = 50,
    number: int = 5,
) -> pa.Table:
    """Up to `number` demonstrations of each document, each of another cluster: doc_id, question_id, place (int32).

    Of the `nearest` questions most similar to the document, the most similar of each cluster is taken, clusters used
    least so far first (ties by the smaller number), and then they are shuffled. Use is counted over documents in the
    order of their ids, so the table depends on the set of documents and not on their order; it is made at once for all.
    A document's own question is no demonstration for it: it would be copied.

    Args:
        doc_ids: M ids.
        document_MD: their unit vectors.
        question_ids: N ids.
        question_ND: unit vectors of the questions (not of their patterns), by the same embedder.
        cluster_N: of `cluster`.
        passages: the ids of the documents that each question is about, as far as they are known.
        seed: of the run.
        nearest, number: see above.
    """
    chosen, used, num_own = {}, Counter[int](), Counter(chain.from_iterable(passages))
    for document in sorted(range(len(doc_ids)), key=lambda place: doc_ids[place]):
        doc_id = doc_ids[document]
        similarity_N = question_ND @ document_MD[document]
        order = np.argsort(-similarity_N, kind="stable")[: nearest + num_own[doc_id]]
        best: dict[int, int] = {}
        for row in [row for row in order if doc_id not in passages[row]][:nearest]:
            best.setdefault(int(cluster_N[row]), int(row))
        clusters = sorted(best, key=lambda name: (used[name], name))[:number]
        used.update(clusters)
        shuffled = np.random.default_rng(seed_of(seed, "demonstrations", doc_id)).permutation(clusters)
        chosen[doc_id] = [question_ids[best[int(name)]] for name in shuffled]
    return _demonstrations(chosen)


def draw_demonstrations(
    doc_ids: Sequence[str],
    question_ids: Sequence[str],
    passages: Sequence[Collection[str]],
    *,
    seed: int,
    number: int = 5,
) -> pa.Table:
    """As `choose_demonstrations`, but drawn for each document by its id: what choosing is compared with."""
    chosen, num_own = {}, Counter(chain.from_iterable(passages))
    for doc_id in sorted(doc_ids):
        order = np.random.default_rng(seed_of(seed, "drawn_demonstrations", doc_id)).permutation(len(question_ids))
        others = [row for row in order[: number + num_own[doc_id]] if doc_id not in passages[row]]
        chosen[doc_id] = [question_ids[row] for row in others[:number]]
    return _demonstrations(chosen)


def _demonstrations(chosen: Mapping[str, Sequence[str]]) -> pa.Table:
    rows = [
        {"doc_id": doc_id, "question_id": question_id, "place": place}
        for doc_id, question_ids in chosen.items()
        for place, question_id in enumerate(question_ids)
    ]
    schema = pa.schema([("doc_id", pa.string()), ("question_id", pa.string()), ("place", pa.int32())])
    return pa.Table.from_pylist(rows, schema=schema)
