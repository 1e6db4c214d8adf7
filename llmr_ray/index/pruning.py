"""Frees what old snapshots of a collection hold: the snapshots, and the documents and vectors that they alone need."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmr_ray.durable import remove
from llmr_ray.errors import DataError
from llmr_ray.index.collection import snapshots
from llmr_ray.index.snapshot import folder_of, named
from llmr_ray.locks import locked

_ROLES = ("index", "embeddings", "prepare")
"""Artifacts of a segment; each is made from the next."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed, or would be: ids of snapshots and of artifacts, and the size of the artifacts' files."""

    snapshots: list[str]
    artifacts: list[str]
    num_bytes: int


def prune(root: Path | str, name: str, *, keep: int, dry_run: bool = False) -> Pruned:
    """Removes all but the newest snapshots of a collection; the current one, and what a roll-back brings, stay.

    Which one servers serve is not known here: their storage may be read-only. A server that refused all that stay
    serves an older one, and says so at /readyz; prune when the current one is served.

    Of the artifacts that only removed snapshots have, those go that `llmr index add` and `compact` made. A run's own
    documents and vectors are the run's and stay, as does what a snapshot of any other collection needs. A process that
    has an old snapshot open keeps its vectors, but may find its texts gone. After a kill the same command goes on.

    Args:
        root: the artifact root.
        name: the collection.
        keep: so many newest snapshots stay; at least 1.
        dry_run: say what would be removed, and remove nothing.

    Raises:
        DataError: `keep` is below 1, or there is no such collection.
        LockedError: another process writes the collection, or an artifact that would be removed.
    """
    if keep < 1:
        raise DataError(f"keep is {keep}, but the newest snapshot has to stay, or numbers would be given twice.")
    root = Path(root)
    collection = folder_of(root, name)
    with locked(collection):
        known = snapshots(root, name)
        state = named(collection)
        stay = {state.current, state.previous, *(manifest["id"] for manifest in known[-keep:])}
        old = [manifest for manifest in known if manifest["id"] not in stay]
        gone = {manifest["id"] for manifest in old}
        needed = {
            artifact
            for other in root.glob("collections/*/CURRENT")
            for manifest in snapshots(root, other.parent.name)
            if other.parent != collection or manifest["id"] not in gone
            for artifact in _artifacts(manifest)
        }
        unneeded = list(dict.fromkeys(item for manifest in old for item in _artifacts(manifest) if item not in needed))
        found = [item for item in unneeded if (root / item).exists()]
        size = sum(file.stat().st_size for item in found for file in (root / item).rglob("*") if file.is_file())
        if not dry_run:
            # Snapshots last: as long as they are listed, the same command knows what is theirs.
            for artifact in found:
                with locked(root / artifact):
                    remove(root / artifact)
            for manifest in old:
                remove(collection / "snapshots" / manifest["id"] / "manifest.json")
                remove(collection / "snapshots" / manifest["id"])
    return Pruned(snapshots=sorted(gone), artifacts=found, num_bytes=size)


def _artifacts(manifest: dict[str, Any]) -> Iterator[str]:
    """The artifacts of a snapshot's segments that were made for a collection and not by a run."""
    for segment in manifest["segments"]:
        if segment["prepare"].startswith("documents/"):
            yield from (segment[role] for role in _ROLES)
