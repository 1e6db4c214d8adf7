"""What pruning may remove, and what it must leave: whatever is served, can be gone back to, or belongs to a run."""

from pathlib import Path

import numpy as np
import pytest

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config
from llmr_ray.errors import DataError, LockedError
from llmr_ray.index import collection, pruning
from llmr_ray.index.snapshot import OpenSnapshot, current, folder_of
from llmr_ray.index.vectors import encoder_of, to_table
from llmr_ray.schemas import table_of
from tests.collections_world import built, document, indexed, unit


def added(root: Path, first: int) -> str:
    """Three documents as `llmr index add` leaves them: artifacts documents, embed and index; the index's id."""
    rows = [document(f"n{row}", row - first, text=f"n{row}") for row in range(first, first + 3)]
    documents = Artifact(root, ArtifactSpec(stage="documents", version=1, config={"first": first}, inputs={}))
    documents.begin()
    documents.write_shard(0, {"corpus": table_of("corpus", rows)}, Counts(rows_in=3, ok=3))
    documents.commit(1, seconds=0)
    spec = ArtifactSpec(
        stage="embed",
        version=1,
        config={"pooling": "mean", "precision": "float32"},
        inputs={"embedder": "model", "prepare": documents.id},
    )
    embeddings = Artifact(root, spec)
    embeddings.begin()
    vectors = unit(np.random.default_rng(first), 3, 16)
    table = to_table("doc_id", [row["doc_id"] for row in rows], vectors)
    embeddings.write_shard(0, {"document_embeddings": table}, Counts(rows_in=3, ok=3))
    embeddings.commit(1, seconds=0, extra={"encoder": encoder_of(embeddings)})
    return built(Config(), root, embeddings, [0, 3]).id


def grown(root: Path) -> list[str]:
    """A collection of a run's ten documents and of three files, the second of which was taken back; its snapshots."""
    index = indexed(root, unit(np.random.default_rng(0), 10, 16))
    made = [collection.create(root, "c", index.id, model="model").snapshot]
    made += [collection.add_segment(root, "c", added(root, first)).snapshot for first in (0, 10)]
    made.append(collection.create(root, "c", index.id, model="model", replace=True).snapshot)
    made.append(collection.add_segment(root, "c", added(root, 20)).snapshot)
    return made


def sizes(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}


def test_what_is_served_and_gone_back_to_stays_whole(tmp_path: Path) -> None:
    made = grown(tmp_path)
    before = sizes(tmp_path)
    foreseen = pruning.prune(tmp_path, "c", keep=1, dry_run=True)
    assert sizes(tmp_path) == before
    pruned = pruning.prune(tmp_path, "c", keep=1)
    assert pruned == foreseen
    assert pruned.snapshots == made[:3]
    # Three artifacts for each of the two files that neither of the snapshots that stay has.
    assert sorted(item.partition("/")[0] for item in pruned.artifacts) == sorted(2 * ["documents", "embed", "index"])
    gone = before.keys() - sizes(tmp_path).keys()
    of_artifacts = [path for path in gone if "snapshots" not in path.parts]
    assert pruned.num_bytes == sum(before[path] for path in of_artifacts) > 0
    for snapshot in made[3:]:
        OpenSnapshot(tmp_path, "c", snapshot).verify()
    assert collection.rollback(tmp_path, "c").snapshot == made[3]
    assert OpenSnapshot(tmp_path, "c", current(folder_of(tmp_path, "c"))).num_documents == 10
    assert pruning.prune(tmp_path, "c", keep=1).snapshots == []


def test_after_going_back_both_sides_stay(tmp_path: Path) -> None:
    """The current snapshot may be an old one; the newest keeps its number from being given again."""
    made = grown(tmp_path)
    collection.rollback(tmp_path, "c")
    pruning.prune(tmp_path, "c", keep=1)
    assert [entry["id"] for entry in collection.snapshots(tmp_path, "c")] == made[3:]
    assert collection.delete(tmp_path, "c", ["d0"]).snapshot.startswith("000006-")


def test_another_collection_keeps_what_it_needs(tmp_path: Path) -> None:
    made = grown(tmp_path)
    shared = collection.snapshots(tmp_path, "c")[1]["segments"][1]["index"]
    collection.create(tmp_path, "other", shared, model="model")
    pruned = pruning.prune(tmp_path, "c", keep=1)
    assert shared not in pruned.artifacts
    assert pruned.snapshots == made[:3]
    OpenSnapshot(tmp_path, "other", current(folder_of(tmp_path, "other"))).verify()


def test_a_kill_loses_nothing_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after each removal in turn: what stays is whole, and the next call removes the rest."""
    made = grown(tmp_path)
    wanted = pruning.prune(tmp_path, "c", keep=1, dry_run=True)
    kept = [path for path in sizes(tmp_path) if not any(item in str(path) for item in wanted.artifacts)]
    removed = pruning.remove
    for _ in range(100):

        def remove_once(path: Path) -> None:
            removed(path)
            raise KeyboardInterrupt

        monkeypatch.setattr(pruning, "remove", remove_once)
        try:
            pruning.prune(tmp_path, "c", keep=1)
        except KeyboardInterrupt:
            for snapshot in made[3:]:
                OpenSnapshot(tmp_path, "c", snapshot).verify()
            continue
        break
    left = sizes(tmp_path)
    assert not any((tmp_path / item).exists() for item in wanted.artifacts)
    assert [entry["id"] for entry in collection.snapshots(tmp_path, "c")] == made[3:]
    assert all(path in left for path in kept if not any(snapshot in path.parts for snapshot in made[:3]))


def test_what_is_being_written_is_not_removed(tmp_path: Path) -> None:
    grown(tmp_path)
    [first, *_] = pruning.prune(tmp_path, "c", keep=1, dry_run=True).artifacts
    with Artifact.found(tmp_path, first).lock(), pytest.raises(LockedError):
        pruning.prune(tmp_path, "c", keep=1)
    assert (tmp_path / first / "manifest.json").exists()


def test_the_newest_must_stay(tmp_path: Path) -> None:
    grown(tmp_path)
    with pytest.raises(DataError, match="has to stay"):
        pruning.prune(tmp_path, "c", keep=0)
