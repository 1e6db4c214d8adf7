"""Snapshots: what a collection of documents is at one moment, opened for search.

A collection is a folder of immutable snapshots and the name of the current one (collection.py writes them):

    {artifact_root}/collections/{name}/snapshots/{id}/manifest.json, deleted.parquet
    {artifact_root}/collections/{name}/CURRENT

A snapshot names segments, each of three artifacts (corpus rows, embeddings, index), and the rows of them that are
deleted. Rows are numbered over the whole snapshot, segment after segment, shards likewise. Ties go to the lower row, so
to the document that has been there longer.

Files are checked against their sha256 when they are first opened.
"""

import json
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.artifacts import Artifact, sha256_file
from llmr_ray.errors import DataError
from llmr_ray.index import shards as faiss_shards
from llmr_ray.index.filters import COLUMNS, Attributes, Filter, key_of
from llmr_ray.index.rows import read_rows
from llmr_ray.index.topk import nothing

MASK_BYTES = 64 << 20
"""What the masks of recent filters may take up in a process, all open snapshots together; the least recently used go
first."""

TEXT_BYTES = 64 << 20
"""The same of decoded row groups of the corpus."""

_ENTRY_BYTES = 1024

_TEXTS = ("doc_id", "title", "meta", "text")


def folder_of(root: Path | str, collection: str) -> Path:
    """The folder of a collection; DataError for a name that is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", collection):
        raise DataError("a collection's name is 1 to 64 letters, digits, '_' or '-', the first no '_' or '-'.")
    return Path(root) / "collections" / collection


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a collection's file CURRENT says.

    current: the id of the snapshot that is to be served. previous: of the one that was current before, and that a
    roll-back makes current again; None: there is none. accepted: of the one that is to be served whatever canary
    queries find (collection.accept); None: there is none.
    """

    current: str
    previous: str | None
    accepted: str | None


def named(collection: Path) -> Named:
    """Which snapshots a collection names; DataError where there is no such collection, or its file is damaged."""
    path = collection / "CURRENT"
    if not path.exists():
        raise DataError(f"there is no collection {collection.name} in {collection.parent}. Make it: llmr index create.")
    try:
        state: dict[str, str | None] = json.loads(path.read_text())
        return Named(current=str(state["current"]), previous=state["previous"], accepted=state.get("accepted"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged: {error!r}. Bring it back, or write what it should say, with the id of a folder in "
            f'{collection / "snapshots"}: {{"current": ID, "previous": null}}.'
        ) from error


def current(collection: Path) -> str:
    """The id of the snapshot that is to be served; errors as of `named`."""
    return named(collection).current


def read_manifest(collection: Path, snapshot_id: str) -> dict[str, Any]:
    """What a snapshot consists of; DataError where there is none of this id, or its file is damaged."""
    if not re.fullmatch(r"\d{6}-[0-9a-f]{12}", snapshot_id):
        raise DataError("a snapshot's id is a number of 6 digits, '-', and 12 hexadecimal digits.")
    path = collection / "snapshots" / snapshot_id / "manifest.json"
    if not path.exists():
        raise DataError(f"collection {collection.name} has no snapshot {snapshot_id}. Look: llmr index list.")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        written = manifest["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged: {error!r}. Bring it back. If that snapshot is the current one, llmr index rollback; "
            f"if nobody needs it, delete {path.parent}."
        ) from error
    if written != snapshot_id:
        raise DataError(f"{path} is the manifest of {written}. The folder was renamed by hand; move it back.")
    return manifest


def read_deleted(collection: Path, manifest: dict[str, Any]) -> dict[int, np.ndarray]:
    """The deleted rows of each segment, ascending; DataError where the file changed."""
    if manifest["deleted"] is None:
        return {}
    path = collection / "snapshots" / manifest["id"] / manifest["deleted"]["file"]
    if not path.exists() or sha256_file(path) != manifest["deleted"]["sha256"]:
        raise DataError(
            f"{path} is missing or its bytes changed since it was committed. Roll back: llmr index rollback."
        )
    table = pq.read_table(path)
    segment, row = np.asarray(table["segment"]), np.asarray(table["row"])
    return {int(number): np.sort(row[segment == number]) for number in np.unique(segment)}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document as it is shown. text: None where it was not asked for."""

    doc_id: str
    title: str | None
    text: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _OpenShard:
    """A shard, which of its documents are not deleted (None: all), and what filters see of them."""

    shard: faiss_shards.Shard
    live_N: np.ndarray | None
    attributes: "_LazyAttributes"


class OpenSnapshot:
    """A snapshot opened for search, whole or some of its shards; files are mapped, so opening twice costs pages once.

    Args:
        root: the artifact root.
        collection: the collection's name.
        snapshot_id: of it, see `current`.
        shards: numbers of the shards to open; None: all. `documents` serves every row in any case.
        num_threads: of FAISS, in the whole process.
        encoder: what `vectors.encoder_of` says of the embeddings that queries will have; None: not compared.
        scan: runtime.index_scan.

    Raises:
        DataError: there is no such snapshot, a file's bytes changed, or the encoder is another one.
    """

    def __init__(
        self,
        root: Path | str,
        collection: str,
        snapshot_id: str,
        *,
        shards: Sequence[int] | None = None,
        num_threads: int = 1,
        encoder: str | None = None,
        scan: str = "auto",
    ) -> None:
        self._root, self._folder = Path(root), folder_of(root, collection)
        self.manifest = read_manifest(self._folder, snapshot_id)
        self.id = snapshot_id
        self.encoder: str = self.manifest["encoder"]
        self.dimension: int = self.manifest["dimension"]
        self.num_documents: int = self.manifest["num_documents"]
        self.num_shards = sum(segment["num_shards"] for segment in self.manifest["segments"])
        if encoder is not None and encoder != self.encoder:
            raise DataError(
                f"queries would be embedded by {encoder}, but snapshot {snapshot_id} was by {self.encoder}. Their "
                "scores would mean nothing; serve the encoder of the collection, or build it anew."
            )
        faiss_shards.set_threads(num_threads)
        self._first_rows = [0, *accumulate(segment["num_documents"] for segment in self.manifest["segments"])]
        self._how = faiss_shards.Opening(scan=scan, num_threads=num_threads)
        self._shards = self._open(range(self.num_shards) if shards is None else shards)
        self._texts = [_Texts(self._artifact(segment["prepare"])) for segment in self.manifest["segments"]]

    def search(
        self, query_QD: np.ndarray, k: int, *, allowed: Sequence[Filter | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of the opened shards for each query.

        Args:
            query_QD: float32 [Q, D], finite.
            k: results per query.
            allowed: Q filters, which are applied before the search; None: every document that is not deleted.

        Returns:
            rows int64 [Q, k] of the snapshot, and scores float32 [Q, k]; topk.MISSING and -inf where there are no more.
            Exact kinds find the k best, by score and then by lower row.

        Raises:
            DataError: NaN or infinite values, or another dimension.
        """
        if len(allowed) != len(query_QD):
            raise ValueError(f"{len(query_QD)} queries need as many filters, but there are {len(allowed)}.")
        groups: dict[str, tuple[Filter | None, list[int]]] = {}
        for number, chosen in enumerate(allowed):
            groups.setdefault("" if chosen is None else key_of(chosen), (chosen, []))[1].append(number)
        rows_QK, scores_QK = nothing(len(query_QD), k)
        for key, (chosen, members) in groups.items():
            query_MD = np.ascontiguousarray(query_QD[members], np.float32)
            scopes_M2 = np.tile([[0, self._first_rows[-1]]], (len(members), 1))
            if self._shards:
                masks = [self._mask(opened, key, chosen) for opened in self._shards]
                found = faiss_shards.search_all(
                    [opened.shard for opened in self._shards], query_MD, scopes_M2, k, masks
                )
                rows_QK[members], scores_QK[members] = found
        return rows_QK, scores_QK

    def read_attributes(self) -> None:
        """Reads what filters see of the opened shards' documents, which the first filter would otherwise do."""
        for opened in self._shards:
            opened.attributes.read()

    @property
    def is_approximate(self) -> bool:
        """Whether an opened shard only proposes documents, so that results of several k need not begin alike."""
        return any(opened.shard.proposals is not None for opened in self._shards)

    def documents(self, rows: Sequence[int], *, with_text: bool) -> list[Document]:
        """The documents of some rows, in their order.

        Raises:
            DataError: a row is none of the snapshot's (MISSING is none), or a file's bytes changed.
        """
        result = []
        for row in map(int, rows):
            if not 0 <= row < self._first_rows[-1]:
                raise DataError(f"row {row} is none of the {self._first_rows[-1]} rows of snapshot {self.id}.")
            segment = bisect_right(self._first_rows, row) - 1
            result.append(self._texts[segment].document(row - self._first_rows[segment], with_text))
        return result

    def verify(self) -> None:
        """Recomputes every checksum of every file that the snapshot needs; DataError names one that does not match."""
        read_deleted(self._folder, self.manifest)
        for segment in self.manifest["segments"]:
            for role in ("prepare", "embeddings", "index"):
                self._artifact(segment[role]).verify()

    def _artifact(self, artifact_id: str) -> Artifact:
        return Artifact.found(self._root, artifact_id)

    def _open(self, numbers: Sequence[int]) -> list[_OpenShard]:
        deleted = read_deleted(self._folder, self.manifest)
        first_shards = [0, *accumulate(segment["num_shards"] for segment in self.manifest["segments"])]
        opened = []
        for number in numbers:
            if not 0 <= number < self.num_shards:
                raise DataError(f"snapshot {self.id} has shards 0 to {self.num_shards - 1}, not {number}.")
            at = bisect_right(first_shards, number) - 1
            segment, first_row = self.manifest["segments"][at], self._first_rows[at]
            index = self._artifact(segment["index"])
            [shard] = faiss_shards.open_shards(index, [number - first_shards[at]], first_row, self._how)
            start = shard.first_row - first_row
            live_N = None
            if at in deleted:
                live_N = np.ones(shard.num_rows, bool)
                gone = deleted[at]
                live_N[gone[(gone >= start) & (gone < start + shard.num_rows)] - start] = False
            attributes = _LazyAttributes.of(self._artifact(segment["prepare"]), start, start + shard.num_rows)
            opened.append(_OpenShard(shard, live_N, attributes))
        return opened

    def _mask(self, opened: _OpenShard, key: str, chosen: Filter | None) -> np.ndarray | None:
        """Which documents of a shard may be found by a filter."""
        if chosen is None:
            return opened.live_N
        place = (self._folder, self.id, opened.shard.first_row, key)
        mask: np.ndarray | None = _masks.get(place)
        if mask is None:
            mask = opened.attributes.mask(chosen)
            if opened.live_N is not None:
                mask &= opened.live_N
            _masks.put(place, mask, mask.nbytes)
        return mask


class _LazyAttributes:
    """What filters see of some rows of a segment, read when it is first needed, for all open snapshots that have it."""

    _known: ClassVar[WeakValueDictionary[tuple[Path, int, int], "_LazyAttributes"]] = WeakValueDictionary()
    _known_lock: ClassVar[Lock] = Lock()

    def __init__(self, prepare: Artifact, start: int, end: int) -> None:
        self._prepare, self._start, self._end = prepare, start, end
        self._lock = Lock()
        self._attributes: Attributes | None = None

    @classmethod
    def of(cls, prepare: Artifact, start: int, end: int) -> "_LazyAttributes":
        """Those of rows [start, end), as any open snapshot has them already."""
        key = (prepare.path, start, end)
        with cls._known_lock:
            if (known := cls._known.get(key)) is None:
                known = cls._known[key] = cls(prepare, start, end)
            return known

    def read(self) -> None:
        """Reads them, unless that is done."""
        with self._lock:
            self._read()

    def mask(self, chosen: Filter) -> np.ndarray:
        """bool, one for each of the rows."""
        with self._lock:
            return self._read().mask(chosen)

    def _read(self) -> Attributes:
        if self._attributes is None:
            columns = [*COLUMNS, "meta"]
            self._attributes = Attributes(read_rows(self._prepare, "corpus", self._start, self._end, columns))
        return self._attributes


class _Cache:
    """The values last used, up to a number of bytes, _ENTRY_BYTES of which go to each value's key and place."""

    def __init__(self, num_bytes: int) -> None:
        self._room, self._lock = num_bytes, Lock()
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keeps a value; the least recently used make room."""
        with self._lock:
            self._room += self._kept.pop(key, (None, 0))[1]
            self._kept[key] = value, num_bytes + _ENTRY_BYTES
            self._room -= num_bytes + _ENTRY_BYTES
            while self._room < 0 and self._kept:
                self._room += self._kept.popitem(last=False)[1][1]


_masks, _groups = _Cache(MASK_BYTES), _Cache(TEXT_BYTES)


class _Texts:
    """The documents of a segment by row, read from the row groups of its corpus table."""

    def __init__(self, prepare: Artifact) -> None:
        self._prepare = prepare
        ledger = sorted(prepare.ledger().items())
        self._parts = [shard for shard, record in ledger if record["rows"].get("corpus")]
        self._starts = [
            0,
            *accumulate(record["rows"]["corpus"] for _, record in ledger if record["rows"].get("corpus")),
        ]
        self._files: dict[int, tuple[pq.ParquetFile, list[int]]] = {}
        self._lock = Lock()

    def document(self, row: int, with_text: bool) -> Document:
        """The document of a row of the segment."""
        at = bisect_right(self._starts, row) - 1
        file, starts = self._file(at)
        row -= self._starts[at]
        group = bisect_right(starts, row) - 1
        columns = _TEXTS if with_text else _TEXTS[:-1]
        place = (self._prepare.path, at, group, with_text)
        table: pa.Table | None = _groups.get(place)
        if table is None:
            with self._lock:  # a ParquetFile reads for one thread at a time
                table = file.read_row_group(group, columns=list(columns)).combine_chunks()
            _groups.put(place, table, table.nbytes)
        found = {name: table[name][row - starts[group]].as_py() for name in columns}
        return Document(
            doc_id=found["doc_id"],
            title=found["title"],
            text=found.get("text"),
            metadata=json.loads(found["meta"]) if found["meta"] else {},
        )

    def _file(self, at: int) -> tuple[pq.ParquetFile, list[int]]:
        """An opened and checked part of the corpus, and the first row of each of its row groups."""
        with self._lock:
            if at not in self._files:
                path = self._prepare.checked_part("corpus", self._parts[at])
                file = pq.ParquetFile(path, memory_map=True)
                sizes = (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
                self._files[at] = file, [0, *accumulate(sizes)]
            return self._files[at]
