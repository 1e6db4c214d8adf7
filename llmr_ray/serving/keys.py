"""API keys: a file of their hashes with names and scopes, read again whenever it changes.

A key is 32 random bytes, so one round of SHA-256 hides it; a slow hash is for what people make up. The file may be
replaced at any time (rotation without a restart): `llmr keys` does so atomically. While it cannot be read the last good
keys stay.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmr_ray.durable import write_atomic
from llmr_ray.errors import ConfigError
from llmr_ray.locks import locked

SCOPES = ("read", "admin")
"""read: ask. admin: that too, and metrics, why a snapshot was refused, and having the server look for a new one."""

PREFIX = "llmr_"
"""By which a key is known when it turns up where it should not."""

LOOK_SECONDS = 0.5
"""The file is looked at this often at the most."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key without its secret.

    filter: only documents that it admits are found by requests of this key, whatever else they filter by.
    """

    name: str
    scopes: tuple[str, ...]
    sha256: str
    created: str = ""
    filter: Mapping[str, Any] | None = None

    def may(self, scope: str) -> bool:
        """Whether the key has a scope. The scope admin holds all others."""
        return scope in self.scopes or "admin" in self.scopes


def digest(secret: str) -> str:
    """What is kept of a key: hex SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; none where there is no file.

    Raises:
        ConfigError: it is no file of keys.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        keys = [
            Key(
                name=str(row["name"]),
                scopes=tuple(row["scopes"]),
                sha256=str(row["sha256"]),
                created=str(row.get("created", "")),
                filter=row.get("filter"),
            )
            for row in json.loads(data)["keys"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of API keys. Make one with `llmr keys add`.") from error
    if any(set(key.scopes) - set(SCOPES) or len(key.sha256) != 64 for key in keys):
        raise ConfigError(f"{path} holds a key whose scopes are not of {SCOPES}, or whose hash is no SHA-256.")
    return keys


def add_key(path: Path, name: str, scopes: tuple[str, ...], document_filter: Mapping[str, Any] | None = None) -> str:
    """Makes a key, keeps its hash in the file and returns the key itself, which is nowhere else.

    Raises:
        ConfigError: there is a key of this name, or the scopes are unknown.
    """
    if not name or not scopes or set(scopes) - set(SCOPES):
        raise ConfigError(f"a key needs a name, and scopes among {', '.join(SCOPES)}.")
    secret = PREFIX + secrets.token_urlsafe(32)
    with locked(path.parent / f".{path.name}.d"):
        keys = read_keys(path)
        if any(key.name == name for key in keys):
            raise ConfigError(f"there is a key '{name}' already. Revoke it first, or choose another name.")
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        made = Key(name=name, scopes=scopes, sha256=digest(secret), created=created, filter=document_filter)
        _write(path, [*keys, made])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Takes a key out of the file; ConfigError where there is none of this name."""
    with locked(path.parent / f".{path.name}.d"):
        keys = read_keys(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ConfigError(f"there is no key '{name}' in {path}. There are: {[key.name for key in keys]}.")
        _write(path, left)


def _write(path: Path, keys: list[Key]) -> None:
    rows: list[dict[str, Any]] = []
    for key in keys:
        kept = {"name": key.name, "scopes": list(key.scopes), "sha256": key.sha256, "created": key.created}
        rows.append(kept | ({"filter": dict(key.filter)} if key.filter else {}))
    mask = os.umask(0o077)
    try:
        write_atomic(path, (json.dumps({"keys": rows}, indent=1) + "\n").encode())
    finally:
        os.umask(mask)


class KeyRing:
    """The keys of a file, as they are now.

    Args:
        path: the file.

    Raises:
        ConfigError: at the start, it is not there or no file of keys.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise ConfigError(f"there is no file of API keys {path}. Make one with `llmr keys add NAME --file {path}`.")
        self.path = path
        self.failures = 0
        self._stamp = self._look()
        self._keys = read_keys(path)
        self._next = time.monotonic() + LOOK_SECONDS

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is. Every key is compared, each in constant time."""
        self._refresh()
        given, found = digest(secret), None
        for key in self._keys:
            if hmac.compare_digest(given, key.sha256):
                found = key
        return found

    def _look(self) -> tuple[int, ...]:
        try:
            status = self.path.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _refresh(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            if not stamp:
                raise ConfigError(f"{self.path} is gone.")
            self._keys = read_keys(self.path)
        except ConfigError as error:
            self.failures += 1
            log.error("the API keys stay as they were: %s", error)
        self._stamp = stamp
