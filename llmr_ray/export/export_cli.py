"""The command `llmr export`: what a run made, in the formats of other projects."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmr_ray.errors import exit_on_user_error


def export(
    run: Annotated[
        str, typer.Argument(help="The YAML file of a finished run, or the folder that it wrote (runs/NAME).")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of that run as key=value.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="Training data: flag_embedding, llm_embedder, tevatron, sentence_transformers. Results: trec, mteb. "
            "The trained embedder: model.",
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("export"),
    method: Annotated[str, typer.Option(help="mteb: whose rankings are measured.")] = "trained",
    num_negatives: Annotated[
        int, typer.Option(help="sentence_transformers: negatives of a row; 0: as many as every group has.")
    ] = 0,
    language: Annotated[str, typer.Option(help="mteb: of the data, for example deu-Latn.")] = "eng-Latn",
    license_name: Annotated[str, typer.Option("--license", help="Of the card, as the hub knows it.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Writes a run's training data, results or embedder as other projects read them, with a card (README.md)."""
    with exit_on_user_error():
        from llmr_ray.export.exporting import Wanted, export_run

        wanted = Wanted(
            form=form,
            out=out,
            method=method,
            num_negatives=num_negatives,
            language=language,
            license_name=license_name,
        )
        done = export_run(run, overrides or [], wanted)
        if as_json:
            typer.echo(json.dumps(asdict(done), indent=1))
            return
        for name, number in done.files.items():
            typer.echo(f"{out / name}: {number:,}")
        for reason, number in done.left_out.items():
            typer.echo(f"left out: {number:,} {reason}")
