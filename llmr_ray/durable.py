"""Files and folders that are there whole or not at all, whatever is killed and however full the disk is."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmr_ray.errors import LlmrError, ResourceError

_STORAGE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for the block to make a file or folder of; put in place when the block ends.

    A reader sees nothing of it before, all of it after, also after a power cut: every file is flushed to the disk, then
    renamed, then the rename is flushed. A folder that stood there before is replaced. When the block fails what it
    wrote is removed; a kill leaves it under a name with ``.tmp-``.

    Raises:
        ResourceError: there is no room, or the storage cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                if file.is_file():
                    flush(file)
            if path.is_dir():
                shutil.rmtree(path)
            commit_rename(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file as `staged` does."""
    with staged(path) as temporary:
        temporary.write_bytes(data)


def commit_rename(temporary: Path, path: Path) -> None:
    """Renames a finished and flushed file or folder into place and makes the rename durable."""
    os.replace(temporary, path)
    flush(path.parent)


def remove(path: Path) -> None:
    """Deletes a file or folder; what is not there is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raises ResourceError naming `path` where the block fails for the storage's sake.

    Libraries report a full disk under classes of their own (faiss, safetensors), which keep the system's words.
    """
    try:
        yield
    except LlmrError:
        raise
    except Exception as error:
        codes = [code for code in _STORAGE_FAULTS if getattr(error, "errno", None) == code or _says(error, code)]
        if not codes:
            raise
        raise ResourceError(
            f"{path} could not be written: {os.strerror(codes[0])}. What was committed before is whole. Make room "
            "there (or repair the storage) and run the same command again."
        ) from error


def _says(error: Exception, code: int) -> bool:
    return os.strerror(code) in str(error)


def flush(path: Path) -> None:
    """Has the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
