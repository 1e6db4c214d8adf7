"""What collections do that takes a cluster: embedding documents from a file, and merging segments.

add:      a file of JSON lines -> the artifacts documents, embed and index -> a new segment.
compact:  the documents of all segments that are not deleted -> the same three artifacts, vectors copied -> one segment.

Each step is an artifact named by what determines it, made shard by shard: after a kill the same command goes on with
the shards that are missing, and only then is there a new snapshot.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmr_ray import assets, cluster
from llmr_ray.artifacts import (
    SHARD_ROWS,
    Artifact,
    ArtifactSpec,
    Counts,
    canonical_json,
    sha256_file,
    sha256_text,
)
from llmr_ray.assets import Asset
from llmr_ray.config import Config, DatasetConfig
from llmr_ray.data.records import Bad, BadRow, check_text, one_line, parse_json_line
from llmr_ray.durable import write_atomic
from llmr_ray.errors import DataError
from llmr_ray.index import collection
from llmr_ray.index.collection import Change
from llmr_ray.index.rows import read_rows
from llmr_ray.index.shards import settings_of
from llmr_ray.index.snapshot import current, folder_of, read_deleted, read_manifest
from llmr_ray.index.stage import EMBED_VERSION, index_spec, run_embed, run_index
from llmr_ray.runtime_config import RuntimeConfig
from llmr_ray.schemas import table_of
from llmr_ray.task_config import TaskConfig

DOCUMENTS_VERSION = 1

FIELDS = ("doc_id", "title", "text", "task", "pool", "metadata")
"""What a line of a file may have; doc_id and text it must."""

MAX_BAD_FRACTION = 0.05
"""Bad lines of a file above this share are taken for a defect of the file."""


def add(runtime: RuntimeConfig, name: str, file: Path, *, max_bad_fraction: float = MAX_BAD_FRACTION) -> Change:
    """Embeds and indexes the documents of a file as a new segment of a collection; equal ids replace older documents.

    Args:
        runtime: the artifact root, and where the work runs.
        name: the collection.
        file: JSON lines {doc_id, text, title, task, pool, metadata}. task: one of those the collection's embedder has
            instructions for; needed where these are several. metadata: an object.
        max_bad_fraction: share of the lines that may be bad. They are in the quarantine of the artifact `documents`.

    Raises:
        DataError: the file cannot be read or too much of it is bad, or the embedder is not the collection's.
    """
    root = Path(runtime.artifact_root)
    manifest = _current(root, name)
    base = Artifact.found(root, manifest["segments"][0]["embeddings"])
    embedder = _embedder(manifest["model"], base, root, runtime.cache_root)
    config = _config(base, manifest, runtime)
    documents = Artifact(root, _documents_spec(file, name, sorted(config.tasks)))
    documents.make(partial(_run_documents, runtime, documents, file, max_bad_fraction))
    embeddings = Artifact(root, _embed_spec(base, documents))
    embeddings.make(partial(run_embed, config, embeddings, embedder, documents, with_queries=False))
    index = Artifact(root, index_spec(config, embeddings))
    index.make(partial(run_index, config, index, embeddings))
    counts = documents.require()["counts"]
    return collection.add_segment(root, name, index.id, num_quarantined=sum(counts["quarantined"].values()))


def compact(runtime: RuntimeConfig, name: str) -> Change:
    """Makes one segment of all, without the deleted documents. Results stay the same; nothing is embedded."""
    root = Path(runtime.artifact_root)
    manifest = _current(root, name)
    if len(manifest["segments"]) == 1 and not manifest["deleted"]:
        return Change(snapshot=manifest["id"], num_documents=manifest["num_documents"])
    base = Artifact.found(root, manifest["segments"][0]["embeddings"])
    config = _config(base, manifest, runtime)
    content = canonical_json([manifest["segments"], manifest["deleted"] and manifest["deleted"]["sha256"]])
    inputs = {"snapshot": sha256_text(content)}
    documents = Artifact(root, ArtifactSpec(stage="documents", version=DOCUMENTS_VERSION, config={}, inputs=inputs))
    live = _live_rows(root, name, manifest)
    documents.make(partial(_run_copy, runtime, documents, manifest, live, "prepare", "corpus"))
    embeddings = Artifact(root, _embed_spec(base, documents))
    embeddings.make(partial(_run_copy, runtime, embeddings, manifest, live, "embeddings", "document_embeddings"))
    index = Artifact(root, index_spec(config, embeddings))
    index.make(partial(run_index, config, index, embeddings))
    return collection.replace_segments(root, name, index.id, instead_of=manifest["id"])


def _current(root: Path, name: str) -> dict[str, Any]:
    folder = folder_of(root, name)
    return read_manifest(folder, current(folder))


def _embedder(model: str, base: Artifact, root: Path, cache_root: str) -> Asset:
    """The model that embedded a collection; DataError where it is another one now."""
    if (root / model / "manifest.json").exists():
        made = Artifact.found(root, model)
        made.verify()
        found = Asset(name=model, kind="model", path=made.file("embedder"), fingerprint=made.id)
    else:
        found = assets.resolve(model, cache_root)
    if found.fingerprint != base.spec.inputs["embedder"] or base.spec.version != EMBED_VERSION:
        raise DataError(
            f"{model} is not what embedded this collection any more: its fingerprint is {found.fingerprint} at version "
            f"{EMBED_VERSION}, but {base.id} was made by {base.spec.inputs['embedder']} at version "
            f"{base.spec.version}. Vectors of both would not compare. Bring that model back, or build the collection "
            "anew: llmr index create --replace."
        )
    return found


def _config(base: Artifact, manifest: dict[str, Any], runtime: RuntimeConfig) -> Config:
    """As much of a configuration as the stages embed and index ask for: what the collection's base was made by."""
    instructions = base.spec.config["instructions"]
    tasks = {
        task: TaskConfig(query_instruction=query, document_instruction=document)
        for task, (query, document) in instructions.items()
    }
    index = settings_of(Artifact.found(runtime.artifact_root, manifest["segments"][0]["index"]))
    return Config(tasks=tasks, index=index, runtime=runtime)


def _embed_spec(base: Artifact, documents: Artifact) -> ArtifactSpec:
    inputs = {"embedder": base.spec.inputs["embedder"], "prepare": documents.id}
    return ArtifactSpec(stage="embed", version=base.spec.version, config=base.spec.config, inputs=inputs)


# --- documents of a file ---------------------------------------------------------------------------------------------


def _documents_spec(file: Path, name: str, tasks: Sequence[str]) -> ArtifactSpec:
    if not file.is_file():
        raise DataError(f"there is no file {file}. Give a file of JSON lines, one document each.")
    settings = {
        "collection": name,
        "tasks": list(tasks),
        "max_text_chars": DatasetConfig().max_text_chars,
        "shard_rows": SHARD_ROWS,
    }
    return ArtifactSpec(
        stage="documents", version=DOCUMENTS_VERSION, config=settings, inputs={"file": sha256_file(file)}
    )


def _run_documents(runtime: RuntimeConfig, artifact: Artifact, file: Path, max_bad_fraction: float) -> None:
    started = time.monotonic()
    path = artifact.path / "offsets.json"
    if not path.exists():
        write_atomic(path, canonical_json(_offsets(file)).encode())
    offsets: list[int] = json.loads(path.read_text())
    num_shards = len(offsets) - 1
    cluster.map_shards(
        artifact.pending(num_shards),
        DocumentsWorker,
        {"artifact": artifact, "file": file, "offsets": offsets},
        num_actors=runtime.mine_actors,
        purpose="read documents",
    )
    if sha256_file(file) != artifact.spec.inputs["file"]:
        raise DataError(f"{file} changed while it was read. Run the same command again.")
    counts = sum((Counts.from_dict(record["counts"]) for record in artifact.ledger().values()), Counts())
    bad = counts.quarantined.total()
    if not counts.ok or bad > max_bad_fraction * counts.rows_in:
        raise DataError(
            f"{file}: {bad} of {counts.rows_in} lines are bad ({dict(counts.quarantined.most_common())}), {counts.ok} "
            f"are documents; {max_bad_fraction:g} of them may be bad. Look at the first: {artifact.path / 'parts'}/"
            "quarantine-*.parquet. Repair the file, or raise --max-bad-fraction if you know why."
        )
    artifact.commit(num_shards, seconds=time.monotonic() - started)


def _offsets(file: Path) -> list[int]:
    """Where in a file every SHARD_ROWS-th line begins, and its end."""
    offsets, at = [], 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if number % SHARD_ROWS == 0:
                offsets.append(at)
            at += len(line)
    if not at:
        raise DataError(f"{file} is empty. Give a file of JSON lines, one document each.")
    return [*offsets, at]


class DocumentsWorker:
    """Reads shards of a file: SHARD_ROWS lines each."""

    def __init__(self, artifact: Artifact, file: Path, offsets: list[int]) -> None:
        self.artifact, self.file, self.offsets = artifact, file, offsets
        self.settings = artifact.spec.config

    def run(self, shard: int) -> dict[str, Any]:
        """Reads one shard and commits it; returns its ledger record. Of lines with one doc_id the last counts."""
        with self.file.open("rb") as file:
            file.seek(self.offsets[shard])
            lines = file.read(self.offsets[shard + 1] - self.offsets[shard]).split(b"\n")
        counts = Counts()
        rows: dict[str, dict[str, Any]] = {}
        bad: list[Bad] = []
        for position, line in enumerate(lines, shard * SHARD_ROWS):
            if not line.strip():
                continue
            counts.rows_in += 1
            where = f"{self.file.name}:{position + 1}"
            try:
                row = self._row(parse_json_line(where, line), position)
            except BadRow as wrong:
                row = wrong.at(where)
            if isinstance(row, Bad):
                bad.append(row)
                counts.quarantined[row.reason] += 1
                continue
            if rows.pop(row["doc_id"], None) is not None:
                counts.skipped["replaced_in_file"] += 1
            rows[row["doc_id"]] = row
        counts.ok = len(rows)
        name = f"collection {self.settings['collection']}"
        quarantine: list[dict[str, object]] = [
            {"dataset": name, "row": item.row, "reason": item.reason, "excerpt": item.excerpt} for item in bad
        ]
        tables = {"corpus": table_of("corpus", list(rows.values())), "quarantine": table_of("quarantine", quarantine)}
        return self.artifact.write_shard(shard, tables, counts)

    def _row(self, row: dict[str, Any] | Bad, position: int) -> dict[str, Any] | Bad:
        """A row of the table `corpus`."""
        if isinstance(row, Bad):
            return row
        if unknown := [key for key in row if key not in FIELDS]:
            raise BadRow("unknown_field", unknown)
        limit, tasks = self.settings["max_text_chars"], self.settings["tasks"]
        doc_id = str(row["doc_id"]) if type(row.get("doc_id")) is int else row.get("doc_id")
        task = row.get("task") or (tasks[0] if len(tasks) == 1 else None)
        if task not in tasks:
            raise BadRow("unknown_task" if task else "missing_task", f"{task!r}; known: {tasks}")
        return {
            "doc_id": check_text(doc_id, "doc_id", 1000),
            "pool": check_text(row.get("pool") or self.settings["collection"], "pool", 1000),
            "position": position,
            "task": task,
            "title": one_line(check_text(row["title"], "title", limit)) if row.get("title") else None,
            "text": check_text(row.get("text"), "text", limit).strip(),
            "meta": _metadata(row.get("metadata")),
        }


def _metadata(value: Any) -> str | None:
    """JSON text of a document's metadata; BadRow for what is no object of JSON."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRow("metadata_not_an_object", value)
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:  # NaN, lone surrogates, a nesting without end
        raise BadRow("bad_metadata", value) from error
    return text if value else None


# --- segments into one -----------------------------------------------------------------------------------------------


def _live_rows(root: Path, name: str, manifest: dict[str, Any]) -> np.ndarray:
    """The rows of a snapshot that are not deleted, ascending: int64."""
    first = list(accumulate((segment["num_documents"] for segment in manifest["segments"]), initial=0))
    live = np.ones(first[-1], bool)
    for at, rows in read_deleted(folder_of(root, name), manifest).items():
        live[first[at] + rows] = False
    if not live.any():
        raise DataError(f"every document of collection {name} is deleted; there is nothing to keep. Add some first.")
    return np.flatnonzero(live)


def _run_copy(
    runtime: RuntimeConfig, artifact: Artifact, manifest: dict[str, Any], live: np.ndarray, role: str, table: str
) -> None:
    """Copies some rows of a table of all segments into one artifact."""
    started = time.monotonic()
    root = Path(runtime.artifact_root)
    sources = [Artifact.found(root, segment[role]) for segment in manifest["segments"]]
    sizes = [segment["num_documents"] for segment in manifest["segments"]]
    num_shards = -(-len(live) // SHARD_ROWS)
    cluster.map_shards(
        artifact.pending(num_shards),
        CopyWorker,
        {"artifact": artifact, "sources": sources, "sizes": sizes, "live": live, "table": table},
        num_actors=runtime.mine_actors,
        purpose="compact",
    )
    extra = {"encoder": manifest["encoder"]} if role == "embeddings" else {}
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra=extra)


class CopyWorker:
    """Copies shards of rows: SHARD_ROWS of those that stay."""

    def __init__(
        self, artifact: Artifact, sources: list[Artifact], sizes: list[int], live: np.ndarray, table: str
    ) -> None:
        self.artifact, self.sources, self.live, self.table = artifact, sources, live, table
        self.first = list(accumulate(sizes, initial=0))

    def run(self, shard: int) -> dict[str, Any]:
        """Copies one shard and commits it; returns its ledger record."""
        chosen = self.live[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        pieces = []
        for at, source in enumerate(self.sources):
            rows = chosen[(chosen >= self.first[at]) & (chosen < self.first[at + 1])] - self.first[at]
            if len(rows):
                span = read_rows(source, self.table, int(rows[0]), int(rows[-1]) + 1)
                pieces.append(span.take(pa.array(rows - rows[0])))
        counts = Counts(rows_in=len(chosen), ok=len(chosen))
        return self.artifact.write_shard(shard, {self.table: pa.concat_tables(pieces)}, counts)
