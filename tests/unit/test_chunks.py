"""Chunks of requests: what decides which floats are computed together."""

import itertools
import random

from llmr_ray.feedback import chunks
from llmr_ray.feedback.chunks import plan_chunks
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.store import Answer, request_keys


def asked(head, tail="", *, targets=(" a",), **fields):
    segments = (Segment(text=head), Segment(text=tail))
    return LLMRequest(request_id=f"{head}/{tail}", unit="u", segments=segments, targets=targets, **fields)


def plan(requests, stored=()):
    keys = [request_keys("s", request) for request in requests]
    return plan_chunks(requests, keys, {key: Answer(key=key) for key in stored})


def names(cut):
    return [[request.request_id for request in chunk.requests] for chunk in cut]


def some(count):
    return [asked(f"document {n % 7}", f"question {n}") for n in range(count)]


def test_chunks_do_not_depend_on_the_order_or_on_what_is_stored(monkeypatch):
    """After a kill the rest must be computed in the same company, or floats differ from an undisturbed run's."""
    monkeypatch.setattr(chunks, "CHUNK_REQUESTS", 8)
    requests = some(100)
    whole = plan(requests)
    shuffled = random.Random(0).sample(requests, len(requests))
    assert names(plan(shuffled)) == names(whole)
    stored = [key for chunk in whole[:3] for key in chunk.wanted]
    rest = plan(requests, stored)
    assert names(rest) == names(whole)[3:]
    assert [chunk.wanted for chunk in rest] == [chunk.wanted for chunk in whole[3:]]


def test_every_key_is_wanted_once():
    """A key wanted twice is paid twice; one wanted never is an answer that does not come."""
    requests = [*some(200), *some(50), asked("document 1", "question 1", targets=(" a", " b"))]
    keys = {key for request in requests for key in request_keys("s", request)}
    wanted = [key for chunk in plan(requests) for key in chunk.wanted]
    assert len(wanted) == len(set(wanted))
    assert set(wanted) == keys
    assert plan(requests, keys) == []


def test_requests_that_begin_alike_stand_together():
    """Seven documents asked about by all queries are read seven times, not once per query."""
    cut = plan(some(420))
    documents = [request.segments[0].text for chunk in cut for request in chunk.requests]
    changes = sum(a != b for a, b in itertools.pairwise(documents))
    assert changes == 6


def test_chunks_are_bounded_by_text_that_is_not_shared(monkeypatch):
    """Long prompts fill a chunk early; a long text that all share counts once; a huge one stands alone."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 1000)
    own = [asked("x", f"{n:03}" + "y" * 297) for n in range(9)]
    assert [len(chunk.requests) for chunk in plan(own)] == [3, 3, 3]
    shared = [asked("z" * 700, f"{n:03}") for n in range(50)]
    assert [len(chunk.requests) for chunk in plan(shared)] == [50]
    huge = asked("w" * 5000)
    assert [len(chunk.requests) for chunk in plan([own[0], huge])] == [1, 1]


def test_samples_and_targets_do_not_mix():
    """Sampling and scoring may go to two engines."""
    requests = [asked("a"), asked("a", targets=(), num_samples=2), asked("b")]
    cut = plan(requests)
    assert [chunk.is_sampling for chunk in cut] == [False, True]
    assert cut[1].before is None
