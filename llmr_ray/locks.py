"""A folder that one process writes at a time, on whichever host it runs."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmr_ray.errors import LockedError
from llmr_ray.ticking import ticking

LEASE_SECONDS = 60.0
"""A lock whose heartbeat is older is of a process that is gone."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this process the only writer of a folder; raises LockedError naming a living owner.

    A lock whose heartbeat is older than LEASE_SECONDS, or whose process on this host is gone, is taken over.
    """
    path = folder / "LOCK"
    folder.mkdir(parents=True, exist_ok=True)
    _acquire(path)
    try:
        with ticking(lambda: os.utime(path), LEASE_SECONDS / 6, "folder-lock-heartbeat"):
            yield
    finally:
        path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    while True:
        try:
            with path.open("x") as handle:
                handle.write(json.dumps(mine, sort_keys=True))
            return
        except FileExistsError:
            pass
        try:
            text, age = path.read_text(), time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        owner = json.loads(text) if text.strip() else {}
        if age < LEASE_SECONDS and not _is_dead(owner):
            raise LockedError(
                f"{path.parent} is being written by process {owner.get('pid')} on {owner.get('host')} since "
                f"{owner.get('since')}. Wait for it to finish, or stop it; two writers would spoil it."
            )
        path.unlink(missing_ok=True)


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname() or "pid" not in owner:
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
