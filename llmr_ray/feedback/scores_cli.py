"""The command `llmr scores`: what the LLM was paid for, looked at, compared, tidied and taken elsewhere."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llmr_ray.errors import exit_on_user_error

app = typer.Typer(help="The store of LLM answers: what it holds, and keeping it in shape.", no_args_is_help=True)

_WHERE = "An artifact root, its llm_store folder, or the folder of one scorer."
Store = Annotated[Path, typer.Argument(help=_WHERE)]
Scorer = Annotated[str | None, typer.Option("--scorer", help="Only this scorer id.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def stats(store: Store, scorer: Scorer = None, as_json: AsJSON = False) -> None:
    """Counts what is stored, per scorer.

    A key is one likelihood target, or one question to sample texts from. Prompt tokens are summed over keys, so a
    prompt counts once for each of its targets. Duplicate rows are answers that a later one replaced.
    """
    with exit_on_user_error():
        from llmr_ray.feedback.inspection import scorer_folders, store_stats

        folders = scorer_folders(store, scorer)
        _show({name: asdict(store_stats(folder)) for name, folder in folders.items()}, as_json)


@app.command()
def diff(
    store_a: Annotated[Path, typer.Argument(help=_WHERE)],
    store_b: Annotated[Path, typer.Argument(help=_WHERE)],
    scorer: Scorer = None,
    as_json: AsJSON = False,
) -> None:
    """Compares the answers of two stores, per scorer that both have.

    Only answers of one scorer id can be compared: of two machines, two builds or two releases of one engine. A key
    hashes the scorer id, which names model, engine, dtype and token limit, so two kinds of engine share no key. The
    folders of one scorer each are compared whatever they are called, so that a renamed copy can be checked.
    """
    with exit_on_user_error():
        from llmr_ray.feedback.inspection import diff_stores, pair_scorers

        pairs = pair_scorers(store_a, store_b, scorer)
        _show({name: asdict(diff_stores(*pair)) for name, pair in pairs.items()}, as_json)


@app.command()
def compact(store: Store, scorer: Scorer = None, as_json: AsJSON = False) -> None:
    """Merges small segments into big ones, per scorer, so that the store opens fast; answers stay the same.

    It may be killed at any time and run beside jobs that read and write the store, but not twice at once.
    """
    with exit_on_user_error():
        from llmr_ray.feedback.compaction import compact as compact_folder
        from llmr_ray.feedback.inspection import scorer_folders

        folders = scorer_folders(store, scorer)
        _show({name: asdict(compact_folder(folder)) for name, folder in folders.items()}, as_json)


@app.command()
def export(
    store: Store,
    out: Annotated[Path, typer.Argument(help="The Parquet file to write; replaced if it is there.")],
    scorer: Scorer = None,
    as_json: AsJSON = False,
) -> None:
    """Writes all answers into one Parquet file, sorted by key: scorer, key and what was answered."""
    with exit_on_user_error():
        from llmr_ray.feedback.export import export_answers
        from llmr_ray.feedback.inspection import scorer_folders

        rows = export_answers(scorer_folders(store, scorer), out)
        _show({str(out): {"answers": rows, "bytes": out.stat().st_size}}, as_json)


def _show(records: Mapping[str, Mapping[str, Any]], as_json: bool) -> None:
    """Prints figures by name: as JSON, or as a table with a column per name."""
    if as_json:
        typer.echo(json.dumps(records, indent=1))
        return
    from rich.table import Table

    from llmr_ray.console import terminal

    console = terminal()
    view = Table("")
    for name in records:
        view.add_column(name, justify="right", overflow="fold")
    for field in next(iter(records.values())):
        view.add_row(field.replace("_", " "), *(_figure(record[field]) for record in records.values()))
    console.print(view)


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
