"""The LLM store: what is paid for once stays, whatever happens to processes and files."""

import logging
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmr_ray.artifacts import sha256_file
from llmr_ray.errors import DataError
from llmr_ray.feedback import segments
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.store import Answer, LLMStore, answers_of, request_keys


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


def test_empty_store_answers_nothing(tmp_path):
    """A first run asks before anything was written; looking must not fail, nor make a folder."""
    empty = LLMStore(tmp_path / "none")
    assert (len(empty), empty.get([]), empty.get([b"k" * 32]), list(empty.scan())) == (0, {}, {}, [])
    assert empty.missing([]) == set()
    assert not empty.folder.exists()


def test_earlier_answer_returns_when_the_later_is_lost(tmp_path):
    """An index that forgot the loser of two equal keys would pay again for what is still on the disk."""
    reader = LLMStore(tmp_path)
    reader.put([answer(1, -1.0)])
    kept = set(tmp_path.iterdir())
    reader.put([answer(1, -2.0), answer(2)])
    assert len(reader) == 2
    (lost,) = set(tmp_path.iterdir()) - kept
    lost.write_bytes(lost.read_bytes()[:50])
    for each in (LLMStore(tmp_path), reader):
        assert each.get([bytes([1]) * 32, bytes([2]) * 32]) == {bytes([1]) * 32: answer(1, -1.0)}
        assert len(each) == 1


def test_segment_spoiled_under_a_reader_is_not_served(tmp_path, caplog):
    """A disk goes bad while a job runs: what was checked at opening must be checked when it is read."""
    reader = LLMStore(tmp_path)
    reader.put([answer(1)])
    assert len(reader) == 1
    path = next(tmp_path.glob("seg-*"))
    data = bytearray(path.read_bytes())
    for place in random.Random(0).sample(range(len(data)), 20):
        data[place] ^= 16
    path.write_bytes(data)
    assert reader.get([bytes([1]) * 32]) == {}
    assert "quarantine" in caplog.text


def test_segment_found_late_does_not_win_by_coming_last(tmp_path):
    """A slow disk shows an old segment after a new one; the name decides, so that all readers agree."""
    reader = LLMStore(tmp_path)
    reader.put([answer(1, -1.0)])
    old = next(tmp_path.glob("seg-*"))
    hidden = old.rename(tmp_path / "hidden")
    reader.put([answer(1, -2.0)])
    assert len(reader) == 1
    hidden.rename(old)
    for each in (reader, LLMStore(tmp_path)):
        assert each.get([bytes([1]) * 32])[bytes([1]) * 32].logprobs[0] == -2.0


def test_answers_read_lately_stay_in_memory(tmp_path, monkeypatch):
    """A job that asks query by query would read and check every segment again for each."""
    reader, reads = LLMStore(tmp_path), []
    for number in range(4):
        reader.put([answer(number), answer(number + 100)])
    keys = [bytes([number]) * 32 for number in (*range(4), *range(100, 104))]
    read = segments.Segment.read

    def counted(segment, *arguments):
        reads.append(segment.name)
        return read(segment, *arguments)

    monkeypatch.setattr(segments.Segment, "read", counted)
    expected = {key: answer(key[0]) for key in keys}
    assert reader.get(keys) == reader.get(keys) == expected
    assert len(reads) == len(set(reads)) == 4
    small = LLMStore(tmp_path, cache_bytes=1)
    assert {key: small.get([key])[key] for key in keys} == expected
    assert len(small._cache) == 1


def test_row_groups_of_a_big_segment(tmp_path):
    """Rows counted from the wrong row group's start would be the answers to other questions."""
    rng = random.Random(0)
    rows = [Answer(key=rng.randbytes(32), logprobs=(float(row),), num_prompt_tokens=row) for row in range(9000)]
    LLMStore(tmp_path).put(rows)
    expected = {row.key: row for row in rows}
    reader = LLMStore(tmp_path)
    assert {segment.starts for segment in reader.segments()} == {(0, 8192)}
    assert reader.get(expected) == expected
    assert {row.key: row for batch in reader.scan() for row in answers_of(batch["key"].to_pylist(), batch)} == expected


def test_segment_of_another_version_is_refused(tmp_path):
    """Whole, but with other columns: taken for damage it would hide paid answers, read it would crash."""
    path = tmp_path / "seg.parquet"
    pq.write_table(pa.table({"key": pa.array([b"k" * 32], pa.binary(32)), "score": [1.0]}), path)
    path.rename(tmp_path / f"seg-{1:020d}-{'0' * 12}-{sha256_file(path)[:16]}.parquet")
    with pytest.raises(DataError, match="score"):
        len(LLMStore(tmp_path))


def test_key_of_wrong_length_is_refused(tmp_path):
    """Keys are compared as 32 bytes; a shorter one would silently match what it is padded to."""
    with pytest.raises(ValueError, match="3 bytes"):
        LLMStore(tmp_path).missing([b"key"])


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    """A full disk: no half segment, no temporary file, and what was there stays readable."""
    kept = LLMStore(tmp_path)
    kept.put([answer(1)])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            kept.put([answer(2)])
    assert len(list(tmp_path.iterdir())) == 1
    assert kept.missing([bytes([1]) * 32, bytes([2]) * 32]) == {bytes([2]) * 32}


def test_costs_are_not_stored(tmp_path):
    """What an answer cost belongs to the call that computed it; read back it costs nothing."""
    LLMStore(tmp_path).put([answer(1, num_computed_tokens=9, num_least_tokens=4)])
    (read,) = LLMStore(tmp_path).get([bytes([1]) * 32]).values()
    assert read == replace(read, num_computed_tokens=0, num_least_tokens=0)


@pytest.mark.parametrize(
    "changed",
    [
        {"targets": (" you ",)},
        {"segments": (Segment(text="Hello ", trim_order=1),)},
        {"segments": (Segment(text="Hello", trim_order=1, max_tokens=3),)},
        {"segments": (Segment(text="Hel", trim_order=1), Segment(text="lo"))},
        {"max_new_tokens": 8},
        {"max_tokens": 64},
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
    assert request_keys("s", request(**drawn)) != request_keys("s", request(**drawn, output_schema="{}"))
