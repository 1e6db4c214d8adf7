"""Files that are there whole or not at all: with kills at the worst moment, and without room."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmr_ray import durable
from llmr_ray.durable import staged, storage_errors, write_atomic
from llmr_ray.errors import DataError, ResourceError

DIE_BEFORE_RENAME = """
import os, sys
from pathlib import Path
from llmr_ray import durable
os.replace = lambda *paths: os._exit(9)
durable.write_atomic(Path(sys.argv[1]), b"new")
"""


def test_kill_between_flush_and_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    died = subprocess.run([sys.executable, "-c", DIE_BEFORE_RENAME, str(path)], check=False)
    assert died.returncode == 9
    assert path.read_bytes() == b"old"
    [left] = [other for other in tmp_path.iterdir() if other != path]
    assert left.read_bytes() == b"new"
    assert ".tmp-" in left.name


def test_everything_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """After a power cut a renamed file that was not flushed is empty."""
    events = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), flush(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("renamed"), replace(*paths)))
    with staged(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "a").write_text("a")
        (temporary / "b").write_text("b")
    renamed = events.index("renamed")
    assert {event.rsplit("/", 1)[-1] for event in events[:renamed]} == {"a", "b"}
    assert events[renamed + 1 :] == [str(tmp_path)]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space"):
        write_atomic(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with staged(target) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), DataError("bad")])
def test_what_fails_leaves_nothing_and_keeps_its_error(tmp_path, error):
    write_atomic(tmp_path / "file", b"old")

    def fail():
        with staged(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error in write: No space left on device"),  # faiss
        OSError(errno.EROFS, "Read-only file system"),
    ],
)
def test_storage_at_fault_is_the_user_s_to_mend(tmp_path, error):
    with (
        pytest.raises(ResourceError, match=r"file could not be written: .*Make room"),
        storage_errors(tmp_path / "file"),
    ):
        raise error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_real_full_device(tmp_path):
    with pytest.raises(ResourceError, match="No space left"), storage_errors(tmp_path):
        Path("/dev/full").write_bytes(b"x")


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "nothing").read_text()


def test_a_file_that_is_gone_is_no_error(tmp_path):
    durable.remove(tmp_path / "nothing")
