"""The command `llmr index`: collections of documents, their snapshots, and which of them is current."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmr_ray.errors import DataError, exit_on_user_error

if TYPE_CHECKING:
    from llmr_ray.runtime_config import RuntimeConfig

app = typer.Typer(help="Collections: what is served, in snapshots that can be gone back to.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The collection: letters, digits, '_' and '-'.")]
Root = Annotated[str, typer.Option("--root", help="The artifact root (runtime.artifact_root).")]
RootOrConfig = Annotated[
    str | None, typer.Option("--root", help="The artifact root; none: that of --config, else ./artifacts.")
]
Config = Annotated[str | None, typer.Option("--config", help="A YAML file whose `runtime` says where the work runs.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    name: Name,
    config: Annotated[str, typer.Argument(help="The YAML file of a finished run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of that run as key=value.")] = None,
    embedder: Annotated[str, typer.Option(help="Which of its embedders: trained, base, or one compared.")] = "trained",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of what the collection holds.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Makes a collection of a run's documents, as one of its embedders indexed them."""
    with exit_on_user_error():
        from llmr_ray.index import collection
        from llmr_ray.pipeline import index_of

        index, model, root = index_of(config, overrides or [], embedder)
        index.require()
        _show(asdict(collection.create(root, name, index.id, model=model, replace=replace)), as_json)


@app.command()
def add(
    name: Name,
    file: Annotated[Path, typer.Argument(help="JSON lines {doc_id, text, title?, task?, pool?, metadata?}.")],
    root: RootOrConfig = None,
    config: Config = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Share of the lines that may be bad.")] = 0.05,
    as_json: AsJSON = False,
) -> None:
    """Embeds the documents of a file and adds them; those whose doc_id is there already replace the older ones.

    Bad lines are counted and kept in the quarantine of the artifact `documents`. After a kill the same command goes on.
    """
    with exit_on_user_error(), _cluster(config, root, f"llmr index add {name} {file}") as runtime:
        from llmr_ray.index import adding

        _show(asdict(adding.add(runtime, name, file, max_bad_fraction=max_bad_fraction)), as_json)


@app.command()
def delete(
    name: Name,
    doc_ids: Annotated[list[str], typer.Argument(help="Document ids, or @FILE with one in each line.")],
    root: Root = "artifacts",
    as_json: AsJSON = False,
) -> None:
    """Takes documents out of a collection; ids that it does not have are counted."""
    with exit_on_user_error():
        from llmr_ray.index import collection

        _show(asdict(collection.delete(root, name, _ids(doc_ids))), as_json)


@app.command()
def compact(name: Name, root: RootOrConfig = None, config: Config = None, as_json: AsJSON = False) -> None:
    """Makes one segment of all, without deleted documents, so that searches have less to do; results stay the same."""
    with exit_on_user_error(), _cluster(config, root, f"llmr index compact {name}") as runtime:
        from llmr_ray.index import adding

        _show(asdict(adding.compact(runtime, name)), as_json)


@app.command(name="list")
def list_(
    name: Annotated[str | None, typer.Argument(help="The collection; none: all of them.")] = None,
    root: Root = "artifacts",
    as_json: AsJSON = False,
) -> None:
    """Lists the snapshots of collections, oldest first."""
    with exit_on_user_error():
        from llmr_ray.index import collection

        names = [name] if name else sorted(path.parent.name for path in Path(root).glob("collections/*/CURRENT"))
        found = {item: collection.snapshots(root, item) for item in names}
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        for item, manifests in found.items():
            for manifest in manifests:
                mark = "*" if manifest["is_current"] else " "
                typer.echo(
                    f"{mark} {item} {manifest['id']}  {manifest['num_documents']:,} documents, "
                    f"{len(manifest['segments'])} segments, {manifest['kind']}, {manifest['created']}"
                )


@app.command()
def rollback(name: Name, root: Root = "artifacts", as_json: AsJSON = False) -> None:
    """Makes the snapshot before the current one current again; a second call comes back."""
    with exit_on_user_error():
        from llmr_ray.index import collection

        _show(asdict(collection.rollback(root, name)), as_json)


@app.command()
def accept(name: Name, root: Root = "artifacts", as_json: AsJSON = False) -> None:
    """Has servers serve the current snapshot although it answers their canary questions otherwise than the one before.

    For a change that is meant, as by `create --replace`. Servers see it at once, those that start later too.
    """
    with exit_on_user_error():
        from llmr_ray.index import collection

        _show(asdict(collection.accept(root, name)), as_json)


@app.command()
def prune(
    name: Name,
    keep: Annotated[int, typer.Option(help="So many newest snapshots stay.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    root: Root = "artifacts",
    as_json: AsJSON = False,
) -> None:
    """Removes old snapshots and what only they need; the current one and the one before it stay.

    Servers that refuse those may serve an older one: prune when /readyz names the current one.
    """
    with exit_on_user_error():
        from llmr_ray.index import pruning

        pruned = pruning.prune(root, name, keep=keep, dry_run=dry_run)
        if as_json:
            typer.echo(json.dumps(asdict(pruned), indent=1))
            return
        for item in (*pruned.snapshots, *pruned.artifacts):
            typer.echo(item)
        typer.echo(
            f"{'would remove' if dry_run else 'removed'} {len(pruned.snapshots)} snapshots and {len(pruned.artifacts)} "
            f"artifacts of {pruned.num_bytes / 1e6:,.1f} MB"
        )


@app.command()
def verify(
    name: Name,
    snapshot: Annotated[str | None, typer.Option(help="Its id; none: the current one.")] = None,
    root: Root = "artifacts",
) -> None:
    """Recomputes the checksum of every file of a snapshot; exit code 3 and the file's name if one is damaged."""
    with exit_on_user_error():
        from llmr_ray.index.snapshot import OpenSnapshot, current, folder_of

        chosen = snapshot or current(folder_of(root, name))
        OpenSnapshot(root, name, chosen, shards=[]).verify()
        typer.echo(f"{name} {chosen}: every file is as it was written")


def _ids(given: list[str]) -> list[str]:
    found = []
    for item in given:
        if not item.startswith("@"):
            found.append(item)
            continue
        path = Path(item[1:])
        if not path.is_file():
            raise DataError(f"there is no file {path}. Give document ids, or @ and a file with one in each line.")
        found += [line for line in path.read_text().splitlines() if line.strip()]
    return found


@contextmanager
def _cluster(config: str | None, root: str | None, command: str) -> Iterator["RuntimeConfig"]:
    """A started Ray, and what says where its work runs."""
    from dataclasses import replace

    from llmr_ray import cluster, loading, stopping
    from llmr_ray.runtime_config import RuntimeConfig

    runtime = loading.load(config).runtime if config else RuntimeConfig()
    if root is not None:
        runtime = replace(runtime, artifact_root=root)
    with stopping.stoppable(command), cluster.or_lost(command):
        cluster.start(runtime)
        yield runtime


def _show(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        if value or name in ("snapshot", "num_documents"):
            typer.echo(f"{name.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
