"""Prompts and their continuations as one token tree: what they share stands once. Pure numpy.

A causal language model computes a token from what precedes it, so sequences that begin alike can share the computation
of their common beginning. The distinct nodes of the trie over all sequences are the fewest tokens that any engine can
compute (`performance.md`: trie_min); the last token of a continuation predicts nothing and is not among them.

The tree is laid out depth first. Then token j is an ancestor of token i, or i itself, exactly if ``j <= i < end[j]``,
where ``end[j]`` is one past the last descendant of j. This is all that attention needs to know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Ids = tuple[int, ...]
Pair = tuple[Ids, Ids]
"""(prompt ids, target ids), neither empty."""


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """A forest in depth-first order. T tokens, P predictions (one for each token of each pair's target).

    token_T: token ids. position_T: depth, which is the position in the sequence. end_T: as in the module's docstring.
    predict_node_P: the tokens that predict. predict_id_P: the ids they predict. bounds: pair n's predictions are
    ``bounds[n]`` to ``bounds[n + 1]``, in the order of its target.
    """

    token_T: np.ndarray
    position_T: np.ndarray
    end_T: np.ndarray
    predict_node_P: np.ndarray
    predict_id_P: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.token_T)

    def paths(self, nodes: np.ndarray) -> np.ndarray:
        """bool [T]: the tokens on the paths from the roots to some nodes, these included."""
        marked = np.bincount(nodes, minlength=len(self) + 1)
        before = np.concatenate([[0], np.cumsum(marked)])
        return np.asarray(before[self.end_T] > before[: len(self)])


def build_tree(pairs: Sequence[Pair]) -> TokenTree:
    """The tree of some pairs, which may repeat."""
    tokens: list[np.ndarray] = []
    starts: list[int] = []
    nodes_of: list[np.ndarray] = [np.zeros(0, np.int64)] * len(pairs)
    size = 0
    path = np.zeros(0, np.int64)
    end = np.zeros(sum(len(prompt) + len(target) - 1 for prompt, target in pairs), np.int64)
    for number, sequence, shared in _walk(pairs):
        end[path[shared:]] = size
        new = len(sequence) - shared
        tokens.append(sequence[shared:])
        starts.append(shared)
        path = np.concatenate([path[:shared], np.arange(size, size + new)])
        size += new
        nodes_of[number] = path[len(pairs[number][0]) - 1 :]
    end[path] = size
    positions = [np.arange(start, start + len(new)) for start, new in zip(starts, tokens, strict=True)]
    return TokenTree(
        token_T=np.concatenate([*tokens, np.zeros(0, np.int64)]),
        position_T=np.concatenate([*positions, np.zeros(0, np.int64)]),
        end_T=end[:size],
        predict_node_P=np.concatenate([*nodes_of, np.zeros(0, np.int64)]),
        predict_id_P=np.asarray([token for _, target in pairs for token in target], np.int64),
        bounds=np.concatenate([[0], np.cumsum([len(target) for _, target in pairs])]).astype(np.int64),
    )


def trie_min(pairs: Sequence[Pair]) -> int:
    """The fewest tokens that an engine can compute for the pairs: the nodes of their tree, without building it."""
    return sum(len(sequence) - shared for _, sequence, shared in _walk(pairs))


def packs(pairs: Sequence[Pair], max_tokens: int) -> Iterator[list[int]]:
    """Cuts pairs into lists of pair numbers whose trees have at most `max_tokens` tokens; a longer pair stands alone.

    Pairs are taken in the tree's order, so neighbours share most; what two packs share is computed in both.
    """
    pack: list[int] = []
    size = 0
    for number, sequence, shared in _walk(pairs):
        new = len(sequence) - shared
        if pack and size + new > max_tokens:
            yield pack
            pack, size, new = [], 0, len(sequence)
        pack.append(number)
        size += new
    if pack:
        yield pack


def _walk(pairs: Sequence[Pair]) -> Iterator[tuple[int, np.ndarray, int]]:
    """The pairs in the order of the tree: number, tokens fed, and how many of these the one before begins with too."""
    previous = np.zeros(0, np.int64)
    for number in sorted(range(len(pairs)), key=lambda number: _fed(pairs[number])):
        sequence = np.asarray(_fed(pairs[number]), np.int64)
        yield number, sequence, _common(previous, sequence)
        previous = sequence


def _fed(pair: Pair) -> Ids:
    prompt, target = pair
    return prompt + target[:-1]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common beginning."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
