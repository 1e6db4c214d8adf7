"""The command line, `llmr`: thin, it calls the same functions as the scripts in jobs/."""

import sys
from typing import Annotated

import typer

from llmr_ray.data import validation_cli
from llmr_ray.errors import exit_on_user_error
from llmr_ray.export import export_cli
from llmr_ray.feedback import scores_cli
from llmr_ray.index import index_cli
from llmr_ray.serving import serving_cli

app = typer.Typer(
    help="Train retrievers from the feedback of the language models that use them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(scores_cli.app, name="scores")
app.add_typer(serving_cli.keys, name="keys")
app.command()(serving_cli.serve)
app.add_typer(index_cli.app, name="index")
app.command()(validation_cli.validate)
app.command()(export_cli.export)

ConfigPath = Annotated[str, typer.Argument(help="A YAML file, for example conf/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example train.num_steps=50.")]


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config, each stage's state and the LLM work to pay.")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="Run this stage alone; its inputs must be done.")] = None,
    allow_restart: Annotated[
        bool, typer.Option("--allow-restart", help="Train anew where none of a training's checkpoints is valid.")
    ] = False,
) -> None:
    """Runs a configuration: what is done is kept, what is missing is made, then the report is written."""
    from llmr_ray.pipeline import run_config

    with exit_on_user_error():
        run_config(config, overrides or [], only=stage, dry_run=dry_run, allow_restart=allow_restart)


@app.command()
@app.command(name="study")
def ablate(
    study: Annotated[str, typer.Argument(help="A YAML file, for example conf/studies/rewards.yaml.")],
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="Training seeds instead of the file's, for example 42,43,44.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each cell has still to do and to pay; run nothing.")
    ] = False,
) -> None:
    """Runs a study: its variants with each seed, every one a run; one table and plots into runs/studies/.

    A cell that fails does not stop the others: exit code 1, and the same command tries it again.
    """
    with exit_on_user_error():
        from llmr_ray.errors import ConfigError
        from llmr_ray.study_runs import run_study_file

        if not all(part.strip().isdecimal() for part in seeds.split(",") if seeds):
            raise ConfigError(f"--seeds takes whole numbers with commas between them, not '{seeds}'.")
        chosen = [int(part) for part in seeds.split(",")] if seeds else None
        run_study_file(study, overrides or [], seeds=chosen, dry_run=dry_run)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure the speed on 200 of the real pairs; they are paid and stored.")
    ] = False,
    tokens_per_second: Annotated[float, typer.Option(help="Speed of one LLM actor, where it is known.")] = 0.0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="The same plan on 1, 8, 64 and 512 GPUs, and where it stops scaling.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="Kind of GPU of the simulation, for example A100-40G.")] = "H100",
    utilisation: Annotated[float, typer.Option(help="Share of peak products that is reached.")] = 0.45,
    fill: Annotated[float, typer.Option(help="Mean length of a text as a share of its limit.")] = 0.5,
    documents: Annotated[int, typer.Option(help="Of a shared pool whose size the configuration does not say.")] = 0,
    node_memory_gb: Annotated[float, typer.Option(help="What an index may take of a node.")] = 256.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan of all stages as JSON, and nothing else.")
    ] = False,
) -> None:
    """Prints what a configuration will cost: LLM feedback, then tokens, FLOPs, GPU hours and storage of each stage."""
    with exit_on_user_error():
        import json

        from llmr_ray import loading
        from llmr_ray.errors import ConfigError
        from llmr_ray.planning import report
        from llmr_ray.planning.hardware import Assumptions

        if not (0 < utilisation <= 1 and 0 < fill <= 1 and node_memory_gb > 0):
            raise ConfigError(
                "--utilisation and --fill are shares above 0 and of 1 at the most, --node-memory-gb above 0."
            )
        assumed = Assumptions(utilisation=utilisation, fill=fill, documents=documents, node_memory_gb=node_memory_gb)
        told = report.told(loading.load(config, overrides or []), assumed, gpu=gpu, simulated=simulate)
        if as_json:
            typer.echo(json.dumps(told, indent=1, allow_nan=False))
            return
        from llmr_ray.pipeline import plan_config

        plan_config(config, overrides or [], probe=probe, tokens_per_second=tokens_per_second)
        typer.echo("\n" + report.text(told))


@app.command(name="eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    endpoint: Annotated[str, typer.Option(help="The server's address, for example http://127.0.0.1:8000.")] = "",
    key: Annotated[str, typer.Option(envvar="LLMR_API_KEY", help="An API key, where the server asks for one.")] = "",
    method: Annotated[str, typer.Option(help="Whose rankings the server's are compared with.")] = "trained",
    require_equal: Annotated[
        bool, typer.Option("--require-equal", help="Exit with code 3 where a measure differs by more than 1e-6.")
    ] = False,
) -> None:
    """Measures a served collection as the run that made it was measured, and shows both figures."""
    with exit_on_user_error():
        from llmr_ray.errors import ConfigError, DataError
        from llmr_ray.pipeline import evaluate_endpoint

        if not endpoint:
            raise ConfigError("give the server's address: --endpoint http://127.0.0.1:8000.")
        found = evaluate_endpoint(config, overrides or [], endpoint, key, method)
        for row in found.figures:
            typer.echo(f"{row.dataset:20} {row.measure:8} n={row.n:<6} run {row.offline:.4f}  served {row.served:.4f}")
        typer.echo(
            f"{found.num_same} of {found.num_queries} rankings are the same, scores differ by "
            f"{found.max_score_difference:.1e} at the most; snapshot {', '.join(found.snapshots)}"
        )
        if require_equal and any(abs(row.offline - row.served) > 1e-6 for row in found.figures):
            raise DataError("the server's measures are not the run's. Has the collection changed since the run?")


@app.command()
def audit(config: ConfigPath, overrides: Overrides = None) -> None:
    """Writes a run's audit.html again: what the LLM rewarded, beside every other ranking of the same candidates."""
    from llmr_ray.pipeline import write_audit_of

    with exit_on_user_error():
        typer.echo(f"audit: {write_audit_of(config, overrides or [])}")


@app.command()
def fetch(config: ConfigPath, overrides: Overrides = None) -> None:
    """Downloads the models and data sets that a configuration names, so that the run itself needs no network."""
    from llmr_ray.pipeline import fetch_assets

    with exit_on_user_error():
        fetch_assets(config, overrides or [])


def run_stage(stage: str | None) -> None:
    """The body of a job script: ``python jobs/STAGE.py CONFIG [key=value ...] [--allow-restart]``; None runs all."""
    from llmr_ray.pipeline import run_config

    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: python {sys.argv[0]} CONFIG [key=value ...] [--allow-restart]")
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    overrides = [argument for argument in sys.argv[2:] if argument != "--allow-restart"]
    with exit_on_user_error():
        run_config(sys.argv[1], overrides, only=stage, allow_restart="--allow-restart" in sys.argv)


def main() -> None:
    """The entry point of the `llmr` command."""
    app()
