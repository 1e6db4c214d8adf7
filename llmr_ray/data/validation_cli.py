"""The command `llmr validate`: what a run would make of data files, row by row, before it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmr_ray.errors import ConfigError, LlmrError

if TYPE_CHECKING:
    from llmr_ray.data.validation import Validated

UNUSABLE, REJECTED = 2, 3
"""Exit codes: the input cannot be read as any data set; rows of it are rejected."""


def validate(
    path: Annotated[
        Path,
        typer.Argument(
            help="A file, a folder, an archive of several data sets; or a run's configuration (.yaml), for its data."
        ),
    ],
    source: Annotated[str, typer.Option(help="The reader, where the format is not recognised or is another.")] = "",
    task: Annotated[str, typer.Option(help="qa, convsearch, chat, lrlm, icl or tool.")] = "",
    name: Annotated[str, typer.Option(help="The data set's name; of several, this one alone.")] = "",
    tokenizer: Annotated[
        Path, typer.Option(help="A model's folder, where texts are cut by its tokens (lrlm).")
    ] = Path(),
    max_text_chars: Annotated[int | None, typer.Option(help="Longer texts are rejected (20,000 characters).")] = None,
    examples: Annotated[int, typer.Option(help="Rejected rows that are shown of each reason.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reads every row as a run would. Exit code 0: all is well; 3: rows are rejected; 2: unusable input.

    Of files alone the formats are recognised; a configuration also says which files of candidates and of a teacher's
    scores belong to them (candidates, given_rewards).
    """
    from llmr_ray.config import DatasetConfig
    from llmr_ray.data.validation import configured_sources, sources_in
    from llmr_ray.data.validation import validate as validate_data
    from llmr_ray.loading import load

    try:
        if path.suffix == ".yaml":
            told = {"--source": source, "--task": task, "--max-text-chars": max_text_chars}
            if given := [option for option, value in told.items() if value]:
                raise ConfigError(f"{path} says itself how its data is read. Leave out {', '.join(given)}.")
            sources = configured_sources(load(path), name=name)
        else:
            most = DatasetConfig().max_text_chars if max_text_chars is None else max_text_chars
            sources = sources_in(path, source=source, task=task, name=name, tokenizer=tokenizer, max_text_chars=most)
        found = [validate_data(data, num_examples=examples) for data in sources]
    except LlmrError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(UNUSABLE) from error
    if not found:
        typer.echo(f"{path} holds no data set called '{name}'.", err=True)
        raise typer.Exit(UNUSABLE)
    if as_json:
        typer.echo(json.dumps([result.to_dict() for result in found], indent=1, ensure_ascii=False))
    else:
        for result in found:
            _show(result)
    if any(result.rejected for result in found):
        raise typer.Exit(REJECTED)


def _show(result: "Validated") -> None:
    from llmr_ray.data.validation import ADVICE

    queries = ", ".join(f"{split} {number:,}" for split, number in sorted(result.num_queries.items())) or "none"
    typer.echo(f"{result.name}: {{task: {result.task}, source: {result.source}, path: {result.path}}}")
    typer.echo(f"  documents: {result.num_documents:,}")
    typer.echo(
        f"  queries: {queries}; {result.num_with_answers:,} with desired outputs, {result.num_with_relevant:,} with "
        f"relevant documents, {result.num_with_candidates:,} with candidates, {result.num_with_rewards:,} with rewards"
    )
    for reason, number in result.left_out.most_common():
        typer.echo(f"  left out: {number:,} {reason}")
    for reason, number in result.rejected.most_common():
        typer.echo(f"  REJECTED: {number:,} {reason}. {ADVICE[reason]}")
        for example in result.examples[reason]:
            typer.echo(f"    {example.row}  {' '.join((example.excerpt or '').split())}")
    share = result.rejected.total() / result.num_rows
    typer.echo(f"  {share:.2%} of {result.num_rows:,} rows rejected" if result.rejected else "  no row is rejected")
