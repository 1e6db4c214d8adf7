"""The commands `llmr serve` and `llmr keys`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmr_ray.errors import ConfigError, exit_on_user_error

keys = typer.Typer(help="API keys of a server: only their hashes are kept.", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Option("--file", envvar="LLMR_SERVE_KEYS_FILE", help="The file of keys.")]


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="What the key is called in logs and limits.")],
    file: KeysFile = Path("keys.json"),
    scope: Annotated[list[str] | None, typer.Option(help="read (the default), or admin, which holds read.")] = None,
    document_filter: Annotated[
        str | None, typer.Option("--filter", help="JSON: the key finds only documents that this filter admits.")
    ] = None,
) -> None:
    """Makes a key and prints it, this once. A running server knows it within a second."""
    with exit_on_user_error():
        from llmr_ray.serving.keys import add_key

        typer.echo(add_key(file, name, tuple(scope or ["read"]), _filter(document_filter)))


def _filter(text: str | None) -> Any:
    from llmr_ray.index.filters import FilterError, parse_filter

    if text is None:
        return None
    try:
        value = json.loads(text)
        parse_filter(value)
    except FilterError as error:
        raise ConfigError(f"--filter: {error}") from error
    except ValueError as error:
        raise ConfigError("--filter is not valid JSON.") from error
    return value


@keys.command(name="list")
def list_(file: KeysFile = Path("keys.json")) -> None:
    """Lists the keys' names, scopes, and when they were made."""
    with exit_on_user_error():
        from llmr_ray.serving.keys import read_keys

        for key in read_keys(file):
            bound = f"  only {json.dumps(key.filter)}" if key.filter else ""
            typer.echo(f"{key.name:20} {','.join(key.scopes):12} {key.created}{bound}")


@keys.command()
def revoke(name: Annotated[str, typer.Argument(help="The key's name.")], file: KeysFile = Path("keys.json")) -> None:
    """Takes a key away. A running server refuses it within a second."""
    with exit_on_user_error():
        from llmr_ray.serving.keys import revoke_key

        revoke_key(file, name)


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN_OR_CONFIG", help="A run's folder, or the YAML file of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, for example serving.shard_groups=2.")
    ] = None,
    host: Annotated[str, typer.Option(envvar="LLMR_SERVE_HOST", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="LLMR_SERVE_PORT", help="The port to listen at.")] = 8000,
    keys_file: Annotated[str | None, typer.Option("--keys", help="The file of API keys (serving.keys_file).")] = None,
    open_to_all: Annotated[bool, typer.Option("--open-to-all", help="Let other machines in without API keys.")] = False,
) -> None:
    """Serves a run's documents over HTTP until it is stopped.

    Where there is no collection of the run's name yet, one is made of its trained embedder's index.
    """
    with exit_on_user_error():
        from llmr_ray.serving import launch

        chosen = [*(overrides or []), *([f"serving.keys_file={keys_file}"] if keys_file else [])]
        source, config, settings = launch.configured(run, chosen)
        is_local = launch.check_host(host, settings, open_to_all=open_to_all)
        launch.check_port(host, port)
        from llmr_ray.serving.server import published, run_server

        command = " ".join(["llmr serve", run, *chosen, f"--host {host} --port {port}"])
        command += " --open-to-all" if open_to_all else ""
        settings = published(source, chosen, config, settings)
        run_server(config.runtime, settings, host, port, command, is_local=is_local)
