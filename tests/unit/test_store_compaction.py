"""Compaction: fewer files, the same answers, whatever is killed, spoiled, written or read meanwhile."""

import os
import random
import shutil
import time

import pytest

from llmr_ray.errors import DataError, LockedError
from llmr_ray.feedback import compaction, segments, store
from llmr_ray.feedback.compaction import compact
from llmr_ray.feedback.store import Answer, LLMStore
from llmr_ray.locks import locked

KEYS = [bytes([number]) * 32 for number in range(30)]


def answer(number, value=-1.5):
    return Answer(
        key=KEYS[number], logprobs=(value,), texts=("é",) * (number % 3), num_prompt_tokens=7, prompt_sha="ab"
    )


def fill(folder):
    """Ten segments of three answers, some of them to keys that were answered before; returns what they answer."""
    expected, writer = {}, LLMStore(folder)
    for number in range(10):
        rows = [answer((2 * number + step) % 30, -float(number)) for step in range(3)]
        writer.put(rows)
        expected |= {row.key: row for row in rows}
    return expected


def names(folder):
    return {path.name for path in folder.glob("seg-*")}


def test_answers_stay_and_files_get_few(tmp_path):
    """The whole point; a row that is moved wrongly is a wrong label that nobody sees."""
    expected = fill(tmp_path)
    reader = LLMStore(tmp_path)
    assert reader.get(KEYS) == expected
    done = compact(tmp_path, segment_rows=8)
    assert (done.merged_segments, done.new_segments, done.answers, done.dropped_rows) == (10, 3, 21, 9)
    assert [segment.num_rows for segment in LLMStore(tmp_path).segments()] == [8, 8, 5]
    for each in (reader, LLMStore(tmp_path)):
        assert each.get(KEYS) == expected
        assert len(each) == len(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names(tmp_path)), "something is left behind"


def test_second_compaction_changes_nothing(tmp_path):
    """A nightly job would rewrite the whole store every night."""
    fill(tmp_path)
    compact(tmp_path, segment_rows=8)
    before = names(tmp_path)
    assert compact(tmp_path, segment_rows=8).merged_segments == 0
    assert names(tmp_path) == before


def test_nothing_to_compact(tmp_path):
    """A store that does not exist yet must not come into being, one with a single segment must stay as it is."""
    assert compact(tmp_path / "none").merged_segments == 0
    assert not (tmp_path / "none").exists()
    LLMStore(tmp_path).put([answer(1)])
    before = names(tmp_path)
    assert compact(tmp_path).merged_segments == 0
    assert names(tmp_path) == before


@pytest.mark.parametrize("seed", range(8))
def test_any_history_is_a_dict(tmp_path, seed):
    """Writing, rewriting and compacting in any order, with full segments left as they are, must equal a dict."""
    rng, expected, reader = random.Random(seed), {}, LLMStore(tmp_path)
    for step in range(25):
        rows = [answer(number, -float(step)) for number in rng.sample(range(30), rng.randrange(1, 9))]
        LLMStore(tmp_path).put(rows)
        expected |= {row.key: row for row in rows}
        if rng.random() < 0.3:
            compact(tmp_path, segment_rows=rng.choice([4, 6, 100]))
        if rng.random() < 0.3:
            assert reader.get(KEYS) == expected
    compact(tmp_path)
    for each in (reader, LLMStore(tmp_path)):
        assert each.get(KEYS) == expected
        assert len(each) == len(expected)


def stop_at(patch, step, stop):
    """Calls `stop` in place of the step-th rename, deletion or sync; returns the list of all calls."""
    done = []

    def stepped(name):
        original = getattr(os, name)

        def call(*arguments, **options):
            done.append(name)
            if len(done) == step + 1:
                stop()
            return original(*arguments, **options)

        return call

    for name in ("replace", "unlink", "fsync"):
        patch.setattr(os, name, stepped(name))
    return done


def num_steps(template, monkeypatch):
    folder = shutil.copytree(template, template.with_name("steps"))
    with monkeypatch.context() as patch:
        done = stop_at(patch, -1, lambda: None)
        compact(folder, segment_rows=8)
    return len(done)


def test_kill_at_every_step(tmp_path, monkeypatch):
    """kill -9 between any two file operations: no answer is lost, none changes, and the next compaction finishes."""
    expected = fill(tmp_path / "template")
    steps = num_steps(tmp_path / "template", monkeypatch)
    assert steps > 15
    for step in range(steps):
        folder = shutil.copytree(tmp_path / "template", tmp_path / str(step))
        reader = LLMStore(folder)
        assert len(reader) == len(expected)
        child = os.fork()
        if child == 0:
            stop_at(monkeypatch, step, lambda: os._exit(9))
            compact(folder, segment_rows=8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        for each in (reader, LLMStore(folder)):
            assert each.get(KEYS) == expected, step
        compact(folder, segment_rows=8)
        for each in (reader, LLMStore(folder)):
            assert each.get(KEYS) == expected, step
        rows = [segment.num_rows for segment in LLMStore(folder).segments()]
        assert sum(rows) == len(expected), f"step {step}: duplicates stayed"
        assert compact(folder, segment_rows=8).merged_segments == 0


def test_error_at_every_step(tmp_path, monkeypatch):
    """A full or failing disk: the error comes out, the answers stay, and neither lock nor temporary file remains."""

    def fail():
        raise OSError(28, "No space left on device")

    expected = fill(tmp_path / "template")
    steps = num_steps(tmp_path / "template", monkeypatch)
    for step in range(steps - 1):  # the last is the removal of the lock itself
        folder = shutil.copytree(tmp_path / "template", tmp_path / str(step))
        with monkeypatch.context() as patch:
            stop_at(patch, step, fail)
            with pytest.raises(OSError, match="No space"):
                compact(folder, segment_rows=8)
        assert LLMStore(folder).get(KEYS) == expected, step
        assert {path.name for path in folder.iterdir()} == names(folder)
        assert not list(folder.glob("*.tmp-*"))


def test_readers_see_the_same_at_every_moment(tmp_path, monkeypatch):
    """A living job reads between any two deletions; a missing answer would be paid for again."""
    expected = fill(tmp_path)
    old = LLMStore(tmp_path)
    assert len(old) == len(expected)
    unlink, seen = os.unlink, []

    def watched(path, **options):
        unlink(path, **options)
        seen.append(
            old.get(KEYS) == expected and LLMStore(tmp_path).get(KEYS) == expected and len(old) == len(expected)
        )

    monkeypatch.setattr(os, "unlink", watched)
    compact(tmp_path, segment_rows=8)
    assert len(seen) >= 10
    assert all(seen)


@pytest.mark.parametrize("reading", ["get", "scan"])
def test_segment_vanishes_between_finding_and_reading(tmp_path, monkeypatch, reading):
    """The compactor deletes the file that a reader is about to open."""
    expected = fill(tmp_path)
    reader = LLMStore(tmp_path)
    read, compacted = segments.Segment.read, []

    def late(segment, *arguments):
        if not compacted:
            compacted.append(True)
            compact(tmp_path)
        return read(segment, *arguments)

    monkeypatch.setattr(segments.Segment, "read", late)
    if reading == "get":
        assert reader.get(KEYS) == expected
    else:
        rows = segments.settled(lambda: [row for batch in reader.scan() for row in batch.to_pylist()])
        assert sorted(row["key"] for row in rows) == sorted(expected)


@pytest.mark.parametrize("shown", [0, 3])
def test_listing_that_overlaps_a_compaction(tmp_path, monkeypatch, shown):
    """A listing may miss the new files, which came behind it, and the old ones, which went before it."""
    expected = fill(tmp_path)
    old = names(tmp_path)
    compact(tmp_path, segment_rows=8)
    listings = [set(sorted(old)[:shown])]
    real = store.list_segments
    monkeypatch.setattr(store, "list_segments", lambda folder: listings.pop() if listings else real(folder))
    assert LLMStore(tmp_path).get(KEYS) == expected


def test_answers_written_meanwhile_stay_and_win(tmp_path, monkeypatch):
    """An actor commits while the new segments are renamed: its answers are neither deleted nor overruled."""
    expected = fill(tmp_path)
    replace, busy = os.replace, []

    def with_writer(source, target):
        if not busy:
            busy.append(True)
            LLMStore(tmp_path).put([answer(0, -99.0), answer(29, -98.0)])
        replace(source, target)

    monkeypatch.setattr(os, "replace", with_writer)
    compact(tmp_path, segment_rows=8)
    expected |= {KEYS[0]: answer(0, -99.0), KEYS[29]: answer(29, -98.0)}
    assert LLMStore(tmp_path).get(KEYS) == expected
    compact(tmp_path, segment_rows=100)
    assert LLMStore(tmp_path).get(KEYS) == expected


def test_one_compactor_at_a_time(tmp_path):
    """Two would write everything twice; the second must be told, and harm nothing."""
    expected = fill(tmp_path)
    before = names(tmp_path)
    with locked(tmp_path), pytest.raises(LockedError):
        compact(tmp_path)
    assert names(tmp_path) == before
    assert LLMStore(tmp_path).get(KEYS) == expected


def test_spoiled_segment_is_left_out(tmp_path, caplog):
    """Damage must not spread into the new segments, and must cost its own answers only."""
    expected = fill(tmp_path)
    last = max(tmp_path.glob("seg-*"))
    last.write_bytes(last.read_bytes()[:-9])
    compact(tmp_path)
    assert (tmp_path / "quarantine" / last.name).exists()
    # The last segment's first answer replaced one of the segment before, which counts again.
    expected = {key: row for key, row in expected.items() if row.logprobs != (-9.0,)} | {KEYS[18]: answer(18, -8.0)}
    assert LLMStore(tmp_path).get(KEYS) == expected


def test_segment_spoiled_while_it_is_merged(tmp_path, monkeypatch):
    """Checked at opening, bad at reading: the compaction starts anew without it."""
    expected = fill(tmp_path)
    last = max(tmp_path.glob("seg-*"))
    write = segments.SegmentWriter.write

    def spoil(writer, batch):
        if last.exists():
            last.write_bytes(b"")
        write(writer, batch)

    monkeypatch.setattr(segments.SegmentWriter, "write", spoil)
    compact(tmp_path, segment_rows=8)
    expected = {key: row for key, row in expected.items() if row.logprobs != (-9.0,)} | {KEYS[18]: answer(18, -8.0)}
    assert LLMStore(tmp_path).get(KEYS) == expected


@pytest.mark.parametrize("fault", ["spoiled", "incomplete"])
def test_bad_result_deletes_nothing(tmp_path, monkeypatch, fault):
    """What was written is read back before anything is deleted: a lying disk or a defect must not cost paid answers."""
    expected = fill(tmp_path)
    if fault == "spoiled":
        rename = segments.commit_rename

        def spoil(source, target):
            rename(source, target)
            target.write_bytes(target.read_bytes()[:-1])

        monkeypatch.setattr(segments, "commit_rename", spoil)
    else:
        scan = LLMStore.scan
        monkeypatch.setattr(LLMStore, "scan", lambda self, chosen: list(scan(self, chosen))[1:])
    with pytest.raises(DataError, match="othing was deleted"):
        compact(tmp_path)
    monkeypatch.undo()
    assert LLMStore(tmp_path).get(KEYS) == expected


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    """Temporary files of killed writers would stay for ever; one that is being written must stay."""
    fill(tmp_path)
    for name, age in (("seg-1.tmp-dead", 2 * compaction._ABANDONED_SECONDS), ("seg-2.tmp-alive", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    compact(tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp-*")] == ["seg-2.tmp-alive"]
