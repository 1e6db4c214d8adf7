"""Collections: snapshots written one after the other, and the name of the current one switched last.

A writer holds the collection's lock, writes a snapshot's folder whole or not at all (durable.staged), checks what is
new in it, and only then replaces CURRENT. A kill at any point leaves CURRENT as it was; the same command goes on,
because a snapshot is named by its content and found again.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmr_ray.artifacts import Artifact, canonical_json, sha256_file, sha256_text, write_table
from llmr_ray.durable import remove, staged, write_atomic
from llmr_ray.errors import DataError
from llmr_ray.index.snapshot import Named, current, folder_of, named, read_deleted, read_manifest
from llmr_ray.locks import locked

Rows = Mapping[int, np.ndarray]
"""Rows of segments, by the segment's number."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a command did. snapshot: the current one after it."""

    snapshot: str
    num_documents: int
    num_added: int = 0
    num_replaced: int = 0
    num_deleted: int = 0
    num_unknown: int = 0
    num_quarantined: int = 0


def segment_of(root: Path | str, index_id: str) -> dict[str, Any]:
    """A finished index as a segment: its artifacts are found through what they were made from."""
    index = Artifact.found(root, index_id)
    embeddings = Artifact.found(root, index.spec.inputs["embeddings"])
    manifest = index.require()
    return {
        "prepare": embeddings.spec.inputs["prepare"],
        "embeddings": embeddings.id,
        "index": index.id,
        "num_shards": manifest["num_shards"],
        "num_documents": manifest["rows"]["ids"],
    }


def create(root: Path | str, name: str, index_id: str, *, model: str, replace: bool = False) -> Change:
    """Makes a collection of a run's index.

    Args:
        root: the artifact root.
        name: the collection's.
        index_id: a finished index.
        model: what embeds its queries and documents: an asset's name, a folder, or the id of a checkpoint artifact.
        replace: where the collection is there, make this index alone its next snapshot.

    Raises:
        DataError: the collection is there with other documents, the index is not finished or has an id twice, or a
            file changed.
        LockedError: another process writes the collection.
    """
    collection = folder_of(root, name)
    segment = segment_of(root, index_id)
    with locked(collection):
        parent = read_manifest(collection, current(collection)) if (collection / "CURRENT").exists() else None
        if parent is not None and parent["segments"] == [segment] and not parent["deleted"]:
            return Change(snapshot=parent["id"], num_documents=parent["num_documents"])
        if parent is not None and not replace:
            raise DataError(
                f"collection {name} is there already, with {parent['num_documents']} documents in "
                f"{len(parent['segments'])} segments. Add to it (llmr index add), or let this index take their place: "
                "--replace. The snapshots until now stay, and `llmr index rollback` goes back."
            )
        doc_ids = _doc_ids(root, segment)
        if len(again := _superseded(doc_ids)):
            raise DataError(
                f"{index_id} has {len(again)} documents whose id comes again, the first is '{doc_ids[int(again[0])]}'. "
                "Deleting or replacing one would take the other along. Give each an id of its own, in all pools, and "
                "run again."
            )
        base = {"model": model, **_facts(root, segment)}
        done = _write(Path(root), collection, parent, base, [segment], {})
        return Change(snapshot=done["id"], num_documents=done["num_documents"], num_added=done["num_documents"])


def add_segment(root: Path | str, name: str, index_id: str, *, num_quarantined: int = 0) -> Change:
    """Makes a finished index the last segment of a collection; documents of equal id in older segments are deleted.

    Raises:
        DataError: the index is of another encoder or dimension, or a file changed.
    """
    collection = folder_of(root, name)
    segment = segment_of(root, index_id)
    with locked(collection):
        parent = read_manifest(collection, current(collection))
        number = len(parent["segments"])
        doc_ids = _doc_ids(root, segment)
        before, superseded = read_deleted(collection, parent), _superseded(doc_ids)
        # Where something of it was deleted or replaced since, it is added once more.
        if any(
            segment == there and np.array_equal(before.get(at, []), superseded)
            for at, there in enumerate(parent["segments"])
        ):
            return Change(snapshot=parent["id"], num_documents=parent["num_documents"], num_quarantined=num_quarantined)
        facts = _facts(root, segment)
        for what in ("encoder", "dimension"):
            if facts[what] != parent[what]:
                raise DataError(
                    f"{index_id} has the {what} {facts[what]}, but collection {name} has {parent[what]}. Scores of "
                    "both would not compare; embed the documents with the collection's embedder (llmr index add)."
                )
        segments = [*parent["segments"], segment]
        older = rows_of(root, parent["segments"], doc_ids)
        deleted = {**_joined(before, older), number: superseded}
        done = _write(Path(root), collection, parent, parent, segments, deleted)
        replaced = sum(len(np.setdiff1d(rows, before.get(at, []))) for at, rows in older.items())
        return Change(
            snapshot=done["id"],
            num_documents=done["num_documents"],
            num_added=len(doc_ids) - len(deleted[number]),
            num_replaced=replaced,
            num_quarantined=num_quarantined,
        )


def replace_segments(root: Path | str, name: str, index_id: str, *, instead_of: str) -> Change:
    """Makes one index, which holds the same documents, take the place of all segments of a snapshot.

    Raises:
        DataError: the collection went on meanwhile, or the index has another number of documents or encoder.
    """
    collection = folder_of(root, name)
    segment = segment_of(root, index_id)
    with locked(collection):
        parent = read_manifest(collection, current(collection))
        facts = _facts(root, segment)
        if parent["segments"] == [segment] and not parent["deleted"]:
            return Change(snapshot=parent["id"], num_documents=parent["num_documents"])
        if parent["id"] != instead_of:
            raise DataError(
                f"collection {name} went on from {instead_of} to {parent['id']} meanwhile. Run the same command again."
            )
        if facts["encoder"] != parent["encoder"] or segment["num_documents"] != parent["num_documents"]:
            raise DataError(f"{index_id} does not hold the documents of {instead_of}; this is a defect of llmr_ray.")
        done = _write(Path(root), collection, parent, {**parent, **facts}, [segment], {})
        return Change(snapshot=done["id"], num_documents=done["num_documents"])


def delete(root: Path | str, name: str, doc_ids: Sequence[str]) -> Change:
    """Makes a snapshot without some documents; ids that the collection does not have are counted.

    Where none of them is there, nothing is written.
    """
    collection = folder_of(root, name)
    with locked(collection):
        parent = read_manifest(collection, current(collection))
        wanted = pa.array(sorted(set(doc_ids)), pa.string())
        before = read_deleted(collection, parent)
        found = {
            at: np.setdiff1d(rows, before.get(at, [])) for at, rows in rows_of(root, parent["segments"], wanted).items()
        }
        # An id has at most one document that is not deleted.
        num_deleted = sum(map(len, found.values()))
        done = parent
        if num_deleted:
            done = _write(Path(root), collection, parent, parent, parent["segments"], _joined(before, found))
        return Change(
            snapshot=done["id"],
            num_documents=done["num_documents"],
            num_deleted=num_deleted,
            num_unknown=len(wanted) - num_deleted,
        )


def rollback(root: Path | str, name: str) -> Change:
    """Makes the snapshot that was current before the current one again; a second call comes back.

    Raises:
        DataError: there is none before.
    """
    collection = folder_of(root, name)
    with locked(collection):
        before = named(collection).previous
        if before is None:
            raise DataError(f"collection {name} has had one snapshot only; there is none to go back to.")
        manifest = read_manifest(collection, before)
        _switch(collection, manifest["id"])
        return Change(snapshot=manifest["id"], num_documents=manifest["num_documents"])


def accept(root: Path | str, name: str) -> Change:
    """Has servers serve the current snapshot although canary queries find other documents in it than before.

    It is remembered of this snapshot, so that servers that start later serve it too.
    """
    collection = folder_of(root, name)
    with locked(collection):
        state = named(collection)
        manifest = read_manifest(collection, state.current)
        _name(collection, replace(state, accepted=state.current))
        return Change(snapshot=manifest["id"], num_documents=manifest["num_documents"])


def snapshots(root: Path | str, name: str, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The manifests of a collection's snapshots, oldest first, each with `is_current`.

    Raises:
        DataError: there is no such collection, or a file of it is damaged (a manifest: unless these are skipped).
    """
    collection = folder_of(root, name)
    now = current(collection)
    found = []
    for path in sorted(collection.glob("snapshots/*/manifest.json")):
        try:
            manifest = read_manifest(collection, path.parent.name)
        except DataError:
            if not skip_damaged:
                raise
        else:
            found.append({**manifest, "is_current": manifest["id"] == now})
    return found


def rows_of(root: Path | str, segments: Sequence[Mapping[str, Any]], doc_ids: pa.Array) -> dict[int, np.ndarray]:
    """The rows of the documents with these ids in each segment, deleted ones included."""
    found: dict[int, np.ndarray] = {}
    for at, segment in enumerate(segments):
        rows = [
            np.asarray(table["row"].filter(pc.is_in(table["doc_id"], value_set=doc_ids)), np.int64)
            for table in _ids(root, segment)
        ]
        if any(map(len, rows)):
            found[at] = np.sort(np.concatenate(rows))
    return found


def _doc_ids(root: Path | str, segment: Mapping[str, Any]) -> pa.Array:
    """The ids of a segment's documents, in the order of its rows."""
    return pa.concat_arrays([table["doc_id"].combine_chunks() for table in _ids(root, segment)])


def _ids(root: Path | str, segment: Mapping[str, Any]) -> Iterable[pa.Table]:
    """The table of row and doc_id of a segment, shard by shard, its bytes checked."""
    index = Artifact.found(root, segment["index"])
    for shard in range(segment["num_shards"]):
        yield pq.read_table(index.checked_part("ids", shard))


def _superseded(doc_ids: pa.Array) -> np.ndarray:
    """Rows of a segment whose id comes again further down."""
    last = {doc_id: row for row, doc_id in enumerate(doc_ids.to_pylist())}
    if len(last) == len(doc_ids):
        return np.zeros(0, np.int64)
    kept = np.zeros(len(doc_ids), bool)
    kept[list(last.values())] = True
    return np.flatnonzero(~kept)


def _joined(first: Rows, second: Rows) -> dict[int, np.ndarray]:
    return {
        at: np.union1d(first.get(at, np.zeros(0, np.int64)), second.get(at, np.zeros(0, np.int64)))
        for at in first.keys() | second.keys()
    }


def _facts(root: Path | str, segment: Mapping[str, Any]) -> dict[str, Any]:
    """What an index says of itself in the manifest of a snapshot."""
    index = Artifact.found(root, segment["index"])
    embeddings = Artifact.found(root, segment["embeddings"])
    extra = index.require()["extra"]
    schema = pq.read_schema(embeddings.checked_part("document_embeddings", 0))
    return {
        "encoder": extra["encoder"],
        "kind": index.spec.config.get("kind", "flat"),
        "dimension": schema.field("embedding").type.list_size,
        "recall": extra.get("recall"),
    }


def _queries(root: Path, manifests: Iterable[Mapping[str, Any]]) -> str | None:
    """The artifact whose queries the first of some snapshots came with; None: all are without."""
    for manifest in manifests:
        if manifest.get("queries"):
            return str(manifest["queries"])
        prepare = Artifact.found(root, manifest["segments"][0]["prepare"])
        if prepare.require()["rows"].get("queries"):
            return prepare.id
    return None


def _write(
    root: Path,
    collection: Path,
    parent: Mapping[str, Any] | None,
    base: Mapping[str, Any],
    segments: Sequence[Mapping[str, Any]],
    deleted: Rows,
) -> dict[str, Any]:
    """Writes a snapshot, checks what its parent did not have, and makes it the current one; returns its manifest."""
    for stale in collection.glob("snapshots/*.tmp-*"):
        remove(stale)
    old = parent["segments"] if parent else []
    for segment in segments:
        if segment not in old:
            for role in ("prepare", "embeddings", "index"):
                Artifact.found(root, segment[role]).verify()
    of = sorted(deleted)
    segment_R = np.repeat(np.asarray(of, np.int32), [len(deleted[at]) for at in of])
    row_R = np.concatenate([np.zeros(0, np.int64), *(deleted[at] for at in of)])
    gone = pa.table({"segment": pa.array(segment_R, pa.int32()), "row": row_R})
    content = {
        "parent": parent["id"] if parent else None,
        "segments": list(segments),
        "deleted": sha256_text(canonical_json([segment_R.tolist(), row_R.tolist()])),
        "model": base["model"],
    }
    tail = sha256_text(canonical_json(content))[:12]
    taken = sorted(
        path.name for path in (collection / "snapshots").glob("??????-*") if (path / "manifest.json").exists()
    )
    same = [name for name in taken if name.endswith(f"-{tail}")]
    # There where a kill came between writing it and making it the current one.
    snapshot_id = same[0] if same else f"{1 + int(taken[-1][:6]) if taken else 1:06d}-{tail}"
    if not same:
        with staged(collection / "snapshots" / snapshot_id) as folder:
            folder.mkdir()
            listed = None
            if gone.num_rows:
                write_table(gone, folder / "deleted.parquet")
                sha256 = sha256_file(folder / "deleted.parquet")
                listed = {"file": "deleted.parquet", "sha256": sha256, "rows": gone.num_rows}
            manifest = {
                **{what: base[what] for what in ("model", "encoder", "kind", "dimension", "recall")},
                "id": snapshot_id,
                # Compacting drops the segment that they came with, and pruning the snapshots that had it.
                "queries": _queries(root, [*([parent] if parent else []), {"segments": segments}]),
                "parent": content["parent"],
                "segments": list(segments),
                "deleted": listed,
                "num_documents": sum(segment["num_documents"] for segment in segments) - gone.num_rows,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    done = read_manifest(collection, snapshot_id)
    read_deleted(collection, done)
    _switch(collection, snapshot_id)
    return done


def _switch(collection: Path, snapshot_id: str) -> None:
    before = named(collection) if (collection / "CURRENT").exists() else None
    if before is None:
        _name(collection, Named(current=snapshot_id, previous=None, accepted=None))
    elif before.current != snapshot_id:
        _name(collection, replace(before, current=snapshot_id, previous=before.current))


def _name(collection: Path, state: Named) -> None:
    write_atomic(collection / "CURRENT", (canonical_json(asdict(state)) + "\n").encode())
