"""The artifact store: what a stage made, named by what determines it, and never half there.

An artifact is a folder ``{root}/{stage}/{h12}`` where ``h12`` hashes the stage, its version, its identity config
and the ids of its inputs. Inside:

    parts/{table}-{shard:05d}.parquet     one file per table and shard
    files/...                             other files (a model, an index)
    _ledger/{shard:05d}.json              written when the shard's files are safe: rows, counts, sha256
    config.json                           the identity that the id hashes
    manifest.json                         written last: an artifact without a valid one does not exist

The shard is the unit of retry, order and determinism: whatever order shards finish in, the bytes are the same.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmr_ray.durable import remove, staged, write_atomic
from llmr_ray.errors import DataError
from llmr_ray.locks import locked
from llmr_ray.schemas import KEYS, SCHEMAS, conform

SHARD_ROWS = 2048
"""Rows of corpus or queries in one shard. It decides file boundaries, hence bytes, so it is no runtime setting."""


BATCH_ROWS = 16_384
"""Rows that are read together where a table is not wanted as a whole. Bounds memory, changes no result."""

GROUP_ROWS = {"corpus": 256}
"""Tables of which single rows are looked up: so many are read for one."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no whitespace, so that equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of a text (lone surrogates allowed)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a pure function of (seed, purpose, epoch, id, ...); the only source of randomness."""
    digest = hashlib.sha256(canonical_json([str(part) for part in parts]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def write_table(table: pa.Table, path: Path, *, group_rows: int | None = None) -> None:
    """Writes a Parquet file atomically; equal tables give equal bytes. group_rows: rows that are read at once."""
    write_tables([table], table.schema, path, group_rows=group_rows)


def write_tables(tables: Iterable[pa.Table], schema: pa.Schema, path: Path, *, group_rows: int | None = None) -> int:
    """The same of a table that comes in parts; returns its number of rows. Where parts end, so do groups of rows."""
    num_rows = 0
    with staged(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=group_rows)
            num_rows += table.num_rows
    return num_rows


@dataclass(kw_only=True)
class Counts:
    """The accounting of a shard or stage: rows_in = ok + cached + quarantined + skipped, each drop with its reason."""

    rows_in: int = 0
    ok: int = 0
    cached: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    llm_tokens: int = 0
    llm_tokens_least: int = 0
    """The fewest tokens that any engine could have processed; llm_tokens over this is the token ratio."""
    label_requests: int = 0
    """Requests in which an LLM labelled pairs, several at once; an annotator of known quality counts what an LLM would
    have been sent."""

    def check(self, where: str) -> None:
        """Raises DataError when rows went missing without a reason."""
        out = self.ok + self.cached + self.quarantined.total() + self.skipped.total()
        if out != self.rows_in:
            raise DataError(
                f"{where}: {self.rows_in} rows in, but {self.ok} ok + {self.cached} cached + "
                f"{self.quarantined.total()} quarantined + {self.skipped.total()} skipped = {out}. Rows were lost or "
                "counted twice; this is a defect of the stage, not of your data."
            )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            rows_in=self.rows_in + other.rows_in,
            ok=self.ok + other.ok,
            cached=self.cached + other.cached,
            quarantined=self.quarantined + other.quarantined,
            skipped=self.skipped + other.skipped,
            llm_tokens=self.llm_tokens + other.llm_tokens,
            llm_tokens_least=self.llm_tokens_least + other.llm_tokens_least,
            label_requests=self.label_requests + other.label_requests,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON form, keys sorted by the writer."""
        return {
            "rows_in": self.rows_in,
            "ok": self.ok,
            "cached": self.cached,
            "quarantined": dict(self.quarantined),
            "skipped": dict(self.skipped),
            "llm_tokens": self.llm_tokens,
            "llm_tokens_least": self.llm_tokens_least,
            "label_requests": self.label_requests,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Counts":
        """The inverse of to_dict."""
        return cls(
            rows_in=record["rows_in"],
            ok=record["ok"],
            cached=record["cached"],
            quarantined=Counter(record["quarantined"]),
            skipped=Counter(record["skipped"]),
            llm_tokens=record["llm_tokens"],
            llm_tokens_least=record.get("llm_tokens_least", 0),
            label_requests=record.get("label_requests", 0),
        )


@dataclass(frozen=True, kw_only=True)
class ArtifactSpec:
    """What determines an artifact: nothing else may change its content.

    `config` is the stage's identity config as plain JSON values; `inputs` maps a role to an artifact id or to the
    fingerprint of an external model or file.
    """

    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """The value that the id hashes."""
        return {"stage": self.stage, "version": self.version, "config": self.config, "inputs": self.inputs}

    @property
    def id(self) -> str:
        """``stage/h12``; runs that agree on the identity share the artifact, whatever they are called."""
        return f"{self.stage}/{sha256_text(canonical_json(self.identity))[:12]}"


class Artifact:
    """An artifact's folder: reading finished tables, writing shards, committing.

    Args:
        root: the store's root folder.
        spec: what determines the artifact.
    """

    def __init__(self, root: Path | str, spec: ArtifactSpec) -> None:
        self.spec = spec
        self.id = spec.id
        self.path = Path(root) / spec.id

    @classmethod
    def found(cls, root: Path | str, artifact_id: str) -> "Artifact":
        """A finished artifact by its id alone; its manifest says what determined it.

        Raises:
            DataError: there is none, or its manifest is not of this id.
        """
        path = Path(root) / artifact_id / "manifest.json"
        if not path.exists():
            raise DataError(
                f"there is no finished artifact {artifact_id} in {root}. Run what makes it, or correct the id."
            )
        try:
            artifact = cls(root, ArtifactSpec(**json.loads(path.read_text())["identity"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}. Delete {path.parent} and run again.") from error
        if artifact.id != artifact_id:
            raise DataError(f"{path} is the manifest of {artifact.id}. The folder was renamed by hand; move it back.")
        return artifact

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the artifact is unfinished. A mismatch of identity raises."""
        path = self.path / "manifest.json"
        if not path.exists():
            return None
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["identity"] != json.loads(canonical_json(self.spec.identity)):
            raise DataError(
                f"{path} was made by another identity than {self.id} claims. The folder was changed by hand or the "
                "hash collided; move it away and run again."
            )
        return manifest

    @property
    def is_done(self) -> bool:
        """Whether the artifact is complete."""
        return self.manifest is not None

    def ledger(self) -> dict[int, dict[str, Any]]:
        """Records of finished shards whose files are there with the recorded size; others count as missing."""
        records = {}
        for path in sorted((self.path / "_ledger").glob("*.json")):
            record = json.loads(path.read_text())
            if all(
                (self.path / name).exists() and (self.path / name).stat().st_size == entry["bytes"]
                for name, entry in record["files"].items()
            ):
                records[int(record["shard"])] = record
        return records

    def pending(self, num_shards: int) -> list[int]:
        """Shards still to do."""
        done = self.ledger()
        return [shard for shard in range(num_shards) if shard not in done]

    # --- writing -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Creates the folder, records the identity and sweeps the temporary files that a killed run left."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.json", (canonical_json(self.spec.identity) + "\n").encode())
        for stale in sorted(self.path.rglob("*.tmp-*")):
            remove(stale)

    def write_shard(
        self,
        shard: int,
        tables: Mapping[str, pa.Table | Iterable[pa.Table]],
        counts: Counts,
        *,
        files: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """Commits a shard: its tables (checked against their schema), then its ledger record. Returns the record.

        Args:
            shard: the shard's number.
            tables: by name; names found in SCHEMAS are conformed first. One that does not fit into memory may come in
                parts, if its name is one of these; keys that two parts share are not noticed.
            counts: the shard's accounting; it must balance.
            files: paths below the artifact's folder that the caller already wrote safely.
        """
        counts.check(f"{self.id} shard {shard}")
        names = list(files)
        rows = {}
        for name, table in tables.items():
            relative, group_rows = _part(name, shard), GROUP_ROWS.get(name)
            if name in SCHEMAS:
                parts = (conform(part, name) for part in ([table] if isinstance(table, pa.Table) else table))
                rows[name] = write_tables(parts, SCHEMAS[name], self.path / relative, group_rows=group_rows)
            else:
                whole: pa.Table = table
                rows[name] = write_tables([whole], whole.schema, self.path / relative, group_rows=group_rows)
            names.append(relative)
        record = {
            "shard": shard,
            "rows": rows,
            "files": {
                name: {"bytes": (self.path / name).stat().st_size, "sha256": sha256_file(self.path / name)}
                for name in sorted(names)
            },
            "counts": counts.to_dict(),
        }
        write_atomic(self.path / "_ledger" / f"{shard:05d}.json", (canonical_json(record) + "\n").encode())
        return record

    def commit(self, num_shards: int, *, seconds: float, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes the manifest once every shard is in the ledger; raises DataError if one is not."""
        ledger = self.ledger()
        missing = [shard for shard in range(num_shards) if shard not in ledger]
        if missing:
            raise DataError(f"{self.id}: shards {missing[:5]} of {num_shards} are not finished; nothing is committed.")
        counts = sum((Counts.from_dict(ledger[shard]["counts"]) for shard in range(num_shards)), Counts())
        counts.check(self.id)
        manifest = {
            "id": self.id,
            "identity": self.spec.identity,
            "num_shards": num_shards,
            "files": {name: entry for shard in range(num_shards) for name, entry in ledger[shard]["files"].items()},
            "rows": dict(sum((Counter(ledger[shard]["rows"]) for shard in range(num_shards)), Counter())),
            "counts": counts.to_dict(),
            "seconds": round(seconds, 3),
            "extra": extra or {},
        }
        write_atomic(self.path / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        return manifest

    # --- reading -----------------------------------------------------------------------------------------------------

    def require(self) -> dict[str, Any]:
        """The manifest of a finished artifact; DataError otherwise."""
        manifest = self.manifest
        if manifest is None:
            raise DataError(f"{self.id} is not finished and cannot be read. Run the stage '{self.spec.stage}' first.")
        return manifest

    def verify(self) -> None:
        """Recomputes every checksum; DataError names the file that does not match."""
        files = self.require()["files"]
        for name in files:
            self._checked(name, files)

    def _checked(self, name: str, files: dict[str, Any]) -> Path:
        """One of the files that the manifest lists; DataError where it is not there as it was committed."""
        path, entry = self.path / name, files.get(name)
        if entry is None or not path.exists() or sha256_file(path) != entry["sha256"]:
            raise DataError(
                f"{path} is missing or its bytes changed since it was committed. Delete {self.path} and run "
                "again: the stage will be redone."
            )
        return path

    def read(
        self,
        table: str,
        shard: int | None = None,
        *,
        columns: Sequence[str] | None = None,
        ids: Iterable[str] | None = None,
    ) -> pa.Table:
        """A finished artifact's table, shards in order (or one shard's part).

        Args:
            table: its name.
            shard: read this one's part alone.
            columns: read these alone.
            ids: only rows that have one of these as the first column of the table's key. The others are never held
                together, so that a stage which needs some documents has not the whole corpus in memory.

        Raises:
            DataError: the artifact is not finished, or lacks the table or a column of it.
        """
        manifest = self.require()
        shards = range(manifest["num_shards"]) if shard is None else [shard]
        paths = [path for number in shards if (path := self.path / _part(table, number)).exists()]
        if not paths:
            raise DataError(f"{self.id} holds no table '{table}'; it holds {sorted(manifest['rows'])}.")
        if columns is not None and (unknown := set(columns) - set(pq.read_schema(paths[0]).names)):
            raise DataError(f"{self.id}: the table '{table}' has no columns {sorted(unknown)}.")
        if ids is None:
            whole = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
        else:
            wanted = pa.array(sorted(set(ids)), pa.string())
            whole = pa.concat_tables([_having(path, KEYS[table][0], wanted, columns) for path in paths])
        return conform(whole, table) if table in SCHEMAS and columns is None else whole

    def batches(self, table: str, shard: int, columns: list[str], start: int, end: int) -> Iterator[pa.Table]:
        """Rows [start, end) of a shard's part of a finished artifact's table, some thousand at a time."""
        place = 0
        with pq.ParquetFile(self.path / _part(table, shard)) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                first, last = max(start - place, 0), min(end - place, batch.num_rows)
                if first < last:
                    yield pa.Table.from_batches([batch]).slice(first, last - first)
                place += batch.num_rows
                if place >= end:
                    return

    def checked_part(self, table: str, shard: int) -> Path:
        """The file that holds a shard's part of a finished artifact's table; DataError where its bytes changed."""
        return self._checked(_part(table, shard), self.require()["files"])

    def part(self, table: str, shard: int) -> pa.Table:
        """What a shard holds of a table, once it is written; the artifact need not be finished."""
        path = self.path / _part(table, shard)
        if shard not in self.ledger() or not path.exists():
            raise DataError(f"{self.id}: shard {shard} of the table '{table}' is not written.")
        part = pq.read_table(path)
        return conform(part, table) if table in SCHEMAS else part

    def file(self, name: str) -> Path:
        """The path of a file below ``files/``."""
        return self.path / "files" / name

    def lock(self) -> AbstractContextManager[None]:
        """Holds the artifact for this process; LockedError names a living owner."""
        return locked(self.path)

    def make(self, run: Callable[[], object]) -> None:
        """Has `run` write and commit the artifact, locked and begun, unless it is finished."""
        if not self.is_done:
            with self.lock():
                self.begin()
                run()


def _having(path: Path, key: str, wanted: pa.Array, columns: Sequence[str] | None) -> pa.Table:
    """Rows of a file whose `key` is among these, read some thousand at a time."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        names = schema.names if columns is None else list(columns)
        parts = [
            part.filter(pc.is_in(part[key], value_set=wanted)).select(names)
            for part in file.iter_batches(batch_size=BATCH_ROWS, columns=list(dict.fromkeys([*names, key])))
        ]
    return pa.Table.from_batches(parts, pa.schema([schema.field(name) for name in names]))


def _part(table: str, shard: int) -> str:
    """Where a shard's rows of a table are, within the artifact."""
    return f"parts/{table}-{shard:05d}.parquet"
