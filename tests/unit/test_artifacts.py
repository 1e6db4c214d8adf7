"""An artifact exists whole or not at all, and its id names all that determines it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from llmr_ray import artifacts
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, seed_of
from llmr_ray.errors import DataError
from llmr_ray.schemas import table_of

SPEC = ArtifactSpec(stage="demo", version=1, config={"a": 1, "b": [1, 2]}, inputs={"data": "f00"})


def shard(artifact: Artifact, number: int, rows: int = 3) -> None:
    table = pa.table({"id": [f"{number}-{row}" for row in range(rows)]})
    artifact.write_shard(number, {"things": table}, Counts(rows_in=rows, ok=rows))


def finished(root: Path) -> Artifact:
    artifact = Artifact(root, SPEC)
    artifact.begin()
    for number in (1, 0):
        shard(artifact, number)
    artifact.commit(2, seconds=1.0)
    return artifact


def test_id_depends_on_identity_alone() -> None:
    """Key order must not change the id; config, inputs and version must."""
    assert SPEC.id == replace(SPEC, config={"b": [1, 2], "a": 1}).id
    changed = [replace(SPEC, config={"a": 2}), replace(SPEC, inputs={"data": "f01"}), replace(SPEC, version=2)]
    assert len({SPEC.id, *(spec.id for spec in changed)}) == 4


def test_order_of_completion_does_not_matter(tmp_path: Path) -> None:
    """Shards finish in any order on a cluster; readers must see one order."""
    assert finished(tmp_path).read("things")["id"].to_pylist() == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]


def test_unfinished_artifact_cannot_be_read_or_committed(tmp_path: Path) -> None:
    """Half an artifact that is taken for a whole one spoils everything after it."""
    artifact = Artifact(tmp_path, SPEC)
    artifact.begin()
    shard(artifact, 0)
    with pytest.raises(DataError, match="not finished"):
        artifact.read("things")
    with pytest.raises(DataError, match=r"shards \[1\] of 2"):
        artifact.commit(2, seconds=0)
    assert artifact.pending(2) == [1]


def test_truncated_part_is_done_again(tmp_path: Path) -> None:
    """A part that lost bytes after its ledger record was written does not count as finished."""
    artifact = Artifact(tmp_path, SPEC)
    artifact.begin()
    shard(artifact, 0)
    part = artifact.path / "parts/things-00000.parquet"
    part.write_bytes(part.read_bytes()[:-4])
    assert artifact.pending(1) == [0]


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    """Parquet and FAISS files load happily with a flipped bit; the checksum must catch it."""
    artifact = finished(tmp_path)
    artifact.verify()
    part = artifact.path / "parts/things-00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"things-00001\.parquet"):
        artifact.verify()


def test_manifest_of_another_identity_is_refused(tmp_path: Path) -> None:
    """A folder renamed or edited by hand must not be served under a new name."""
    artifact = finished(tmp_path)
    path = artifact.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["config"]["a"] = 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="another identity"):
        _ = artifact.is_done


def test_lost_rows_fail_the_shard(tmp_path: Path) -> None:
    """A row that vanishes without a reason is the failure that users cannot see."""
    artifact = Artifact(tmp_path, SPEC)
    artifact.begin()
    with pytest.raises(DataError, match=r"10 rows in.*= 9"):
        artifact.write_shard(0, {}, Counts(rows_in=10, ok=7, quarantined=Counter(nan=1), skipped=Counter(short=1)))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """Same input, same bytes: otherwise no checksum can tell a change."""
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b")
    assert first.require()["files"] == second.require()["files"]


def test_rows_by_id_are_those_of_the_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a document lost at the border of two batches or parts, and another order than the table's."""
    monkeypatch.setattr(artifacts, "BATCH_ROWS", 3)
    artifact = Artifact(tmp_path, SPEC)
    artifact.begin()
    rows = [
        {"doc_id": f"d{number:02}", "pool": "a", "position": number, "task": "qa", "text": f"text {number}"}
        for number in range(20)
    ]
    for shard, part in enumerate((rows[:8], rows[8:])):
        artifact.write_shard(shard, {"corpus": table_of("corpus", part)}, Counts(rows_in=len(part), ok=len(part)))
    artifact.commit(2, seconds=1.0)
    whole = artifact.read("corpus").to_pylist()
    for ids in ([], ["d07"], ["d08", "d07", "d07", "none"], [row["doc_id"] for row in rows]):
        wanted = [row for row in whole if row["doc_id"] in ids]
        assert artifact.read("corpus", ids=ids).to_pylist() == wanted
        texts = artifact.read("corpus", ids=ids, columns=["text"])
        assert texts.to_pylist() == [{"text": row["text"]} for row in wanted]
        assert texts.schema.equals(artifact.read("corpus", columns=["text"]).schema)
    with pytest.raises(DataError, match="no columns \\['txet'\\]"):
        artifact.read("corpus", columns=["txet"])


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    """Temporary files of killed runs would pile up until the disk is full."""
    artifact = Artifact(tmp_path, SPEC)
    artifact.begin()
    stale = artifact.path / "parts"
    stale.mkdir()
    (stale / "things-00000.parquet.tmp-abc").write_bytes(b"half")
    artifact.begin()
    assert not list(artifact.path.rglob("*.tmp-*"))


def test_seeds_are_the_same_everywhere() -> None:
    """A seed that depended on the process (like hash()) would give every worker its own run."""
    assert seed_of(1, "plan", 0, "q1") == 1713354064085355744
    assert seed_of(1, "plan", 0, "q1") != seed_of(1, "plan", 1, "q1")
