"""Texts of documents while it is not known yet which of them are chosen: in a file instead of in memory."""

import json
import mmap
import tempfile
from pathlib import Path


class Texts:
    """An append-only file without a name, which goes with the process.

    Args:
        folder: on whose disk; None: that of the system's temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as this object lives
        self._end = 0
        self._map: mmap.mmap | None = None

    def put(self, *texts: str | None) -> int:
        """Keeps some texts; returns the place at which they are found again."""
        line = json.dumps(texts).encode() + b"\n"  # ASCII on one line, whatever the texts hold
        place = self._end
        self._file.write(line)
        self._end += len(line)
        return place

    def get(self, place: int) -> list[str | None]:
        """The texts at a place."""
        if self._map is None or place >= len(self._map):
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        texts: list[str | None] = json.loads(self._map[place : self._map.find(b"\n", place)].decode("ascii"))
        return texts
