"""Runs the cells of a study as pipelines, and says beforehand what each will cost."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from llmr_ray import cluster, loading, stopping
from llmr_ray.config import Config
from llmr_ray.console import terminal
from llmr_ray.errors import ConfigError, LlmrError, ResourceError
from llmr_ray.feedback import planning
from llmr_ray.pipeline import Pipeline, in_words
from llmr_ray.studies import (
    Cell,
    Finished,
    Outcome,
    Study,
    check_figures,
    figures_without_rows,
    read_study,
    run_study,
    with_seeds,
)
from llmr_ray.study_tables import table, write


def run_study_file(
    path: str, overrides: Sequence[str], *, seeds: Sequence[int] | None = None, dry_run: bool = False
) -> None:
    """Runs all cells of the study in a file, each a run of its own; what is done is kept.

    Args:
        path: the study's file.
        overrides: for all variants, before their own.
        seeds: instead of those of the file; None: those.
        dry_run: say what each cell has still to do and pay, and run nothing.

    Raises:
        ConfigError: the study or the configuration of a cell is wrong; nothing has run.
        LlmrError: cells failed; the table has all others, and the same command tries the failed ones again.
    """
    study = read_study(Path(path))
    command = ["llmr", "ablate", path, *overrides]
    if seeds is not None:
        study = with_seeds(study, list(seeds))
        command += ["--seeds", ",".join(map(str, seeds))]
    console = terminal()
    cells = study.cells(overrides)
    # A misspelt setting of the last variant is found before the first has run for hours.
    configs = [loading.load(study.config, cell.settings) for cell in cells]
    check_figures(study, configs)
    if dry_run:
        _foresee(study, cells, configs, console)
        return
    resume = shlex.join(command)
    folder = Path(configs[0].runtime.run_root) / "studies" / study.name
    places = {(cell.variant, cell.seed): number for number, cell in enumerate(cells)}

    def run(config_path: str, cell: Cell) -> Finished:
        place = places[cell.variant, cell.seed]
        number = place + 1
        console.print(f"cell {number} of {len(cells)}: {cell.label}; resume with: {resume}")
        try:
            command = shlex.join(["llmr", "run", config_path, *cell.settings])
            return run_cell(configs[place], command, resume, console)
        except Exception as error:
            console.print(f"cell {number} of {len(cells)}: {cell.label} failed: {error}", style="red")
            raise

    outcome = run_study(study, overrides, run, partial(_written, study, folder))
    console.print(table(study, outcome))
    print(f"study: {folder / 'study.md'}")
    if outcome.failures:
        labels = "; ".join(f"{failed['variant']} ({failed['seed']})" for failed in outcome.failures)
        raise LlmrError(
            f"{len(outcome.failures)} of {len(cells)} cells failed: {labels}. The table has the others, study.json "
            f"what went wrong; the same command tries the failed ones again: {resume}"
        )
    if lacking := figures_without_rows(study, outcome):
        raise ConfigError(
            f"no cell has the figures {lacking}, so the table lacks them. Their names are data set and measure as in "
            "results.json; with the names put right the same command makes the table anew, and runs nothing again."
        )


def run_cell(config: Config, command: str, resume: str, console: Console) -> Finished:
    """Runs one cell, which `command` would run alone; `resume` is the command that goes on with the study."""
    pipeline = Pipeline(config, console)
    console.print(_ahead(pipeline))
    with stopping.stoppable(resume), cluster.or_lost(resume):
        results = pipeline.run(command)
    assert results is not None
    return Finished(
        config=config,
        results=results,
        metrics=pipeline.by_name["evaluate"].artifact.read("metrics"),
        steps=pipeline.by_name["train"].artifact.read("steps"),
        tokens=feedback_tokens(config),
    )


def feedback_tokens(config: Config) -> int:
    """Tokens that the LLMs' feedback of a configuration takes at the most, whoever has paid them."""
    scorers = 1 + len(config.annotators)
    rounds = range(1, config.rounds + 1)
    costs = planning.question_costs(config)
    costs += [cost for number in rounds for cost in planning.upper_costs(config, again=number > 1) * scorers]
    return sum(cost.tokens for cost in costs)


def _written(study: Study, folder: Path, outcome: Outcome) -> None:
    write(study, outcome, folder)


def _ahead(pipeline: Pipeline) -> str:
    """What a run has still to do and to pay."""
    states = [row["state"] for row in pipeline.describe()]
    paid = in_words(pipeline.costs(), exact=pipeline.is_mined)
    return f"{states.count('done')} of {len(states)} stages are done already. {paid}"


def _foresee(study: Study, cells: Sequence[Cell], configs: Sequence[Config], console: Console) -> None:
    """Prints what each cell would do; what several cells share is counted once, with the first of them."""
    counted: set[str] = set()
    paid: set[frozenset[str]] = set()
    total = 0
    for number, (cell, config) in enumerate(zip(cells, configs, strict=True), 1):
        told = f"cell {number} of {len(cells)}: {cell.label}: "
        try:
            pipeline = Pipeline(config, console)
        except ResourceError as missing:
            console.print(f"{told}something it names is not here: {missing}")
            continue
        rows = pipeline.describe()
        own = {row["artifact"] for row in rows if row["state"] != "done"} - counted
        counted |= own
        asking = frozenset(
            stage.artifact.id
            for stage in pipeline.stages
            if stage.base_name.startswith(("score", "generate")) and not stage.artifact.is_done
        )
        cost = "LLM feedback shared with a cell above." if asking in paid else ""
        if not cost:
            paid.add(asking)
            costs = pipeline.costs()
            total += sum(one.tokens for one in costs)
            cost = in_words(costs, exact=pipeline.is_mined)
        done = sum(row["state"] == "done" for row in rows)
        console.print(f"{told}{done} of {len(rows)} stages done, {len(own)} to make. {cost}")
    console.print(f"{study.name}: {len(counted)} artifacts to make, about {total:,} LLM tokens of feedback.")
