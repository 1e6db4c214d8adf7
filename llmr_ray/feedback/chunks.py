"""Requests cut into chunks: what is computed together, stored together, and lost together when a process dies.

Requests are sorted by prompt, so those that begin alike stand together, whichever query they belong to, and an engine
computes the common beginning once. The cuts depend on all requests of a call, stored or not: so a chunk holds the same
requests before and after a kill, and its floats are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmr_ray.feedback.requests import LLMRequest
from llmr_ray.feedback.store import Answer

CHUNK_REQUESTS = 64
"""Requests of a chunk at the most: the answers that a kill can cost."""

CHUNK_CHARS = 12_288
"""Characters of a chunk that its prompts do not share, about 3,000 tokens: seconds of work on two cores, while what
two neighbours compute both stays about one percent. A single longer request is a chunk of its own."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Requests that an engine answers in one go, starting from an empty prefix cache.

    wanted: the keys to compute, a part of the requests' keys. before: the request in front of the first one in the
    order of prompts, if it is computed in this call too; only the accounting of shared tokens needs it.
    """

    requests: tuple[LLMRequest, ...]
    wanted: frozenset[bytes]
    before: LLMRequest | None = None

    @property
    def is_sampling(self) -> bool:
        """Whether outputs are to be drawn; a chunk holds requests of one kind."""
        return bool(self.requests[0].num_samples)


def plan_chunks(
    requests: Sequence[LLMRequest], keys: Sequence[Sequence[bytes]], stored: Mapping[bytes, Answer]
) -> list[Chunk]:
    """The chunks of which anything is missing.

    Args:
        requests: of one call.
        keys: of each request (store.request_keys).
        stored: the answers there are. A key that several requests need is wanted by the first alone.
    """
    texts = [tuple(segment.text for segment in request.segments) for request in requests]
    order = sorted(range(len(requests)), key=lambda number: (bool(requests[number].num_samples), texts[number], number))
    chunks: list[Chunk] = []
    claimed = set(stored)
    before: LLMRequest | None = None
    for members in _cut(order, requests, texts):
        wanted: set[bytes] = set()
        last: LLMRequest | None = None
        for number in members:
            new = {key for key in keys[number] if key not in claimed}
            if new:
                last = requests[number]
            wanted |= new
            claimed |= new
        if last is not None:
            asked = tuple(requests[number] for number in members)
            same_kind = before is not None and bool(before.num_samples) == bool(last.num_samples)
            chunks.append(Chunk(requests=asked, wanted=frozenset(wanted), before=before if same_kind else None))
            before = last
    return chunks


def _cut(order: Sequence[int], requests: Sequence[LLMRequest], texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
    cuts: list[list[int]] = []
    size = 0
    for number in order:
        request = requests[number]
        own = sum(map(len, request.targets))
        alone = sum(map(len, texts[number])) + own
        new = alone
        if cuts:
            previous = cuts[-1][-1]
            new -= _shared_chars(texts[previous], texts[number])
            full = len(cuts[-1]) == CHUNK_REQUESTS or size + new > CHUNK_CHARS
            mixed = bool(requests[previous].num_samples) != bool(request.num_samples)
        if not cuts or full or mixed:
            cuts.append([])
            size, new = 0, alone
        cuts[-1].append(number)
        size += new
    return cuts


def _shared_chars(a: Sequence[str], b: Sequence[str]) -> int:
    """The characters of the segments in front that are equal: what the two prompts surely share."""
    shared = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        shared += len(left)
    return shared
