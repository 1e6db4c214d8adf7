"""The LLM store: what is paid for once stays, whatever happens to processes and files."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.store import Answer, LLMStore, request_keys


def answer(number, value=-1.5, **more):
    return Answer(
        key=bytes([number]) * 32, logprobs=(value, -0.25), num_prompt_tokens=7, prompt_sha="ab", truncated=True, **more
    )


def request(**changes):
    fields = {"request_id": "r", "unit": "u", "segments": (Segment(text="Hello", trim_order=1),), "targets": (" you",)}
    return LLMRequest(**(fields | changes))


def test_answers_survive_reopening(tmp_path):
    """An answer that changes when read back makes a rerun differ from the run."""
    sampled = Answer(key=b"s" * 32, texts=("é", "", "\n"), num_prompt_tokens=3, prompt_sha="cd")
    LLMStore(tmp_path).put([answer(1, num_computed_tokens=9), sampled])
    store = LLMStore(tmp_path)
    assert store.get([bytes([1]) * 32, b"s" * 32, b"x" * 32]) == {bytes([1]) * 32: answer(1), b"s" * 32: sampled}
    assert store.missing([bytes([1]) * 32, b"x" * 32]) == {b"x" * 32}


def test_errors_are_never_answers(tmp_path):
    """A cached error would stay after its cause is gone."""
    store = LLMStore(tmp_path)
    store.put([Answer(key=b"e" * 32, error="too long")])
    assert not store.get([b"e" * 32])
    assert not list(tmp_path.iterdir())


def test_later_answer_wins_in_every_process(tmp_path):
    """Two processes that read the same store must serve the same answer."""
    first, second = LLMStore(tmp_path), LLMStore(tmp_path)
    first.put([answer(1, -1.0)])
    second.put([answer(1, -2.0)])
    for store in (first, second, LLMStore(tmp_path)):
        assert store.get([bytes([1]) * 32])[bytes([1]) * 32].logprobs[0] == -2.0


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damaged_segment_is_set_aside(tmp_path, caplog, damage):
    """A spoiled file must cost its own answers only: no crash, and no garbage served as log-probabilities."""
    store = LLMStore(tmp_path)
    store.put([answer(1)])
    bad = next(tmp_path.glob("seg-*"))
    store.put([answer(2)])
    data = bytearray(bad.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    bad.write_bytes({"truncate": data[:-10], "flip": data, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        for reader in (LLMStore(tmp_path), store):
            assert set(reader.get([bytes([1]) * 32, bytes([2]) * 32])) == {bytes([2]) * 32}
            assert reader.missing([bytes([1]) * 32])
    assert "quarantine" in caplog.text
    assert (tmp_path / "quarantine" / bad.name).exists()


def test_half_written_file_is_not_read(tmp_path):
    """A killed writer leaves a temporary file; reading it would serve a part of a segment."""
    LLMStore(tmp_path).put([answer(1)])
    segment = next(tmp_path.glob("seg-*"))
    segment.rename(segment.with_name(segment.name + ".tmp-0123"))
    assert len(LLMStore(tmp_path)) == 0


def test_concurrent_writers_lose_nothing(tmp_path):
    """Actors write at the same moment; equal names would overwrite each other's answers."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: LLMStore(tmp_path).put([answer(number)]), range(64)))
    assert len(LLMStore(tmp_path)) == 64


@pytest.mark.parametrize(
    "changed",
    [
        {"targets": (" you ",)},
        {"segments": (Segment(text="Hello ", trim_order=1),)},
        {"segments": (Segment(text="Hello", trim_order=1, max_tokens=3),)},
        {"segments": (Segment(text="Hel", trim_order=1), Segment(text="lo"))},
        {"max_new_tokens": 8},
        {"targets": (), "num_samples": 2},
    ],
)
def test_key_changes_with_whatever_changes_the_answer(changed):
    """A key that misses something serves the answer to another question."""
    assert request_keys("s", request()) != request_keys("s", request(**changed))


def test_key_is_of_question_and_scorer_only():
    """Ids and company in the key would pay again for the same question; a missing scorer would mix two LLMs."""
    assert request_keys("s", request()) == request_keys("s", request(request_id="other", unit="other", seed=5))
    assert request_keys("s", request(targets=(" a", " b")))[1] == request_keys("s", request(targets=(" b",)))[0]
    assert request_keys("s", request()) != request_keys("t", request())


def test_sampling_key_depends_on_seed_only_when_drawing():
    """Greedy output has no seed; drawn output with another seed is another draw."""
    drawn = {"targets": (), "num_samples": 1}
    assert request_keys("s", request(**drawn)) != request_keys("s", request(**drawn, seed=1))
    greedy = drawn | {"temperature": 0.0}
    assert request_keys("s", request(**greedy)) == request_keys("s", request(**greedy, seed=1))
    assert request_keys("s", request(**drawn)) != request_keys("s", request(**drawn, stop=("\n",)))
