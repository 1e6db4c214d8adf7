"""The pipeline: what its stages will cost, and running those that are not done.

The whole plan is known before anything runs (stages.py): that is what `--dry-run` prints, what makes a rerun free, and
why a changed setting redoes only what depends on it.
"""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmr_ray import assets as asset_catalogue
from llmr_ray import cluster, loading, stopping
from llmr_ray.artifacts import Artifact
from llmr_ray.config import LLM, Config
from llmr_ray.console import terminal
from llmr_ray.durable import write_atomic
from llmr_ray.errors import ConfigError, DataError, ResourceError
from llmr_ray.evaluation import audit_page, endpoint, report
from llmr_ray.evaluation.annotators import stage_of
from llmr_ray.evaluation.metrics import relevance_by_query
from llmr_ray.evaluation.published import check_names
from llmr_ray.feedback import planning
from llmr_ray.feedback import stage as feedback
from llmr_ray.feedback.jobs import ScoreJobs
from llmr_ray.feedback.planning import TaskCost
from llmr_ray.feedback.pool import RayClient
from llmr_ray.locks import locked
from llmr_ray.memory import metered_memory
from llmr_ray.stages import MAKES, Stage, StagePlan, in_round


class Pipeline:
    """The stages of one configuration, in the order they run.

    Args:
        config: the resolved configuration.
        console: where progress is printed.
        allow_restart: train anew where none of the checkpoints of an unfinished training is valid.

    Models and data sets are resolved (and fetched where they are missing) on construction, because their
    fingerprints are part of the artifacts' ids.
    """

    def __init__(self, config: Config, console: Console | None = None, *, allow_restart: bool = False) -> None:
        self.config = config
        self.console = console or terminal()
        check_names(config.report.reproduces)
        self.run_dir = Path(config.runtime.run_root) / config.name
        resolved = {name: asset_catalogue.resolve(name, config.runtime.cache_root) for name in _asset_names(config)}
        self.client = RayClient(config, resolved[config.llm.model])
        self.reader = self.client
        if config.reader is not None:
            read = replace(config, llm=config.reader)
            self.reader = RayClient(read, resolved[config.reader.model], self.client.budget)
        annotators = {
            name: (resolved[llm.model], RayClient(replace(config, llm=llm), resolved[llm.model], self.client.budget))
            for name, llm in config.annotators.items()
        }
        self.scorers = {LLM: self.client} | {name: client for name, (_, client) in annotators.items()}
        plan = StagePlan(config, resolved, self.client, self.reader, annotators=annotators, allow_restart=allow_restart)
        self.stages, self.prepared = plan.stages, plan.prepare
        self.by_name = {stage.name: stage for stage in self.stages}

    # --- looking ahead -----------------------------------------------------------------------------------------------

    def describe(self) -> list[dict[str, str]]:
        """Per stage: name, artifact id, and ``done``, ``partial (k shards)`` or ``missing``."""
        stages = self.by_name.items()
        return [{"stage": name, "artifact": at.artifact.id, "state": _state(at.artifact)} for name, at in stages]

    def costs(self) -> list[TaskCost]:
        """The LLM work of writing questions, and of scoring by task and round: exact once candidates are mined, else an
        upper bound. An annotator that is no LLM costs nothing."""
        result = [] if self.prepared.is_done else planning.question_costs(self.config)
        if not self.config.labeling.asks_llm:
            return result
        for number in range(1, self.config.rounds + 1):
            for name, client in self.scorers.items():
                if self._of_round(stage_of("score", name), number).is_done:
                    continue
                if (work := self._work(number)) is not None:
                    result += _named(planning.costs(work, client), name, number, self.config)
                else:
                    result += _upper_costs(name, number, self.config)
        return result

    def _pairs(self, number: int) -> Artifact:
        """What says which pairs the LLM judges in a round."""
        return self._of_round("select" if self.config.labeling.enabled else "mine", number)

    def _work(self, number: int) -> ScoreJobs | None:
        """The pairs that the LLM judges in a round, once they are known."""
        pairs = self._pairs(number)
        table = "asked" if self.config.labeling.enabled else "candidates"
        return feedback.score_jobs(self.config, self.prepared, pairs, table) if pairs.is_done else None

    def _of_round(self, name: str, number: int) -> Artifact:
        return self.by_name[in_round(name, number, self.config.rounds)].artifact

    def plan(self, *, probe: bool, tokens_per_second: float) -> None:
        """Prints what the LLM will cost by task, and how long it takes at a speed that is given or measured.

        Args:
            probe: measure the speed on some of the real pairs, which are paid and stored; candidates must be mined.
            tokens_per_second: of one LLM actor; 0: not known.
        """
        costs = self.costs()
        _print_costs(self.console, self.config, costs, exact=self.is_mined)
        if probe:
            if not self.config.labeling.asks_llm:
                raise ConfigError(
                    f"labeling.annotator is {self.config.labeling.annotator}, so no LLM is asked about pairs, whose "
                    "speed a probe would measure. Run without --probe."
                )
            work = self._work(1)
            if work is None:
                raise ConfigError(
                    "a probe asks about real candidates, and they are not mined yet. Run without --probe."
                )
            actors = max(1, self.config.runtime.llm_actors)
            speed = planning.probe(work, self.client)
            tokens_per_second = speed.tokens / speed.seconds / actors
            self.console.print(
                f"probe: {speed.pairs:,} pairs, {speed.tokens:,} tokens in {speed.seconds:.1f} s on {actors} actors: "
                f"{speed.pairs / speed.seconds:,.1f} pairs/s, {tokens_per_second:,.0f} tokens/s each"
            )
        _print_hours(self.console, self.config, costs, tokens_per_second)

    @property
    def is_mined(self) -> bool:
        """Whether the candidates of all rounds are known, and with them the exact number of pairs."""
        return all(self._pairs(number).is_done for number in range(1, self.config.rounds + 1))

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, command: str, only: str | None = None) -> dict[str, Any] | None:
        """Runs what is not done, in order; returns the results once the report is written.

        Args:
            command: the command that repeats this run, for the report and for resuming.
            only: a stage's name: run that stage alone, its inputs must be done. "report" writes the report alone.

        Raises:
            LlmrError: what stopped the run; everything committed before stays and is not done again.
        """
        if only is not None and only != "report" and only not in self.by_name:
            raise ConfigError(f"there is no stage '{only}'. Stages: {', '.join([*self.by_name, 'report'])}.")
        with locked(self.run_dir), metered_memory() as memory:
            record = {"command": command, "commit": _commit(), "seed": self.config.seed, "versions": _versions()}
            self._record(record | {"status": "running"})
            self.console.print(f"run {self.config.name}: resume with the same command: {command}")
            try:
                for number, stage in enumerate(self.stages, 1):
                    if only in (None, stage.name):
                        self._run_stage(stage, f"[{number}/{len(self.stages)}] {stage.name}", alone=only is not None)
                results = self._report(record) if only in (None, "report") else None
            except BaseException as error:
                status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                self._record(record | {"status": status, "error": f"{type(error).__name__}: {error}"})
                raise
            finally:
                for client in self._clients:
                    client.close()
            self._record(record | {"status": "done", "peak_memory_gb": round(memory.peak_bytes / 2**30, 2)})
        return results

    def _run_stage(self, stage: Stage, label: str, *, alone: bool) -> None:
        artifact = stage.artifact
        if alone:
            stage.require_inputs()
        if artifact.is_done:
            artifact.verify()
            self.console.print(f"{label}: done already ({artifact.id})", style="dim")
            return
        cluster.start(self.config.runtime)
        self._make_room(stage)
        started = time.monotonic()
        self.console.print(f"{label}: {artifact.id}")
        with artifact.lock():
            artifact.begin()
            stage.run(artifact)
        counts = artifact.require()["counts"]
        drops = {**counts["quarantined"], **counts["skipped"]}
        dropped = f", left out {drops}" if drops else ""
        least = counts["llm_tokens_least"]
        ratio = f" ({counts['llm_tokens'] / least:.3f} times the fewest possible)" if least else ""
        tokens = f"{counts['llm_tokens']:,} LLM tokens{ratio}; " if counts["llm_tokens"] else ""
        self.console.print(
            f"{label}: {counts['rows_in']:,} rows in, {counts['ok']:,} ok, {counts['cached']:,} cached{dropped}; "
            f"{tokens}{time.monotonic() - started:.0f} s",
            style="green",
        )
        for warning in artifact.require()["extra"].get("warnings", []):
            self.console.print(f"{label}: warning: {warning}", style="yellow")

    @property
    def _clients(self) -> list[RayClient]:
        return [*self.scorers.values(), self.reader]

    def _make_room(self, stage: Stage) -> None:
        """Two LLMs need not fit side by side: the actors of the one that a stage does not ask end before it."""
        asked = stage.inputs.get("client")
        for client in self._clients:
            if asked is not None and client is not asked:
                client.close()

    def finished(self) -> dict[str, Artifact]:
        """Finished artifacts as the report takes them, those of the last round."""
        done = {MAKES.get(at.base_name, at.base_name): at.artifact for at in self.stages if at.artifact.is_done}
        done["prepare"] = self.prepared
        if "labels" in done:
            done |= {"rewards": done["labels"], "candidates": done["select"]}
        return done

    def _report(self, record: dict[str, Any]) -> dict[str, Any]:
        done = self.finished()
        if "evaluate" not in done:
            raise DataError("the evaluation is not finished, so there is nothing to report. Run the stage 'evaluate'.")
        stages = [
            {"stage": stage.name, "artifact": stage.artifact.id, "seconds": manifest["seconds"], **manifest["counts"]}
            | {"warnings": manifest["extra"].get("warnings", [])}
            for stage in self.stages
            if (manifest := stage.artifact.manifest) is not None
        ]
        # Rounds take the place of what the configuration calls "trained".
        methods = list(done["evaluate"].spec.config["evaluate"]["methods"])
        results = report.write_report(
            run_dir=self.run_dir,
            config=replace(self.config, evaluate=replace(self.config.evaluate, methods=methods)),
            artifacts=done,
            stages=stages,
            command=record["command"],
            commit=record["commit"],
        )
        report.print_table(results, self.console)
        self.console.print(f"report: {self.run_dir / 'report.html'}\nembedder: {self.run_dir / 'embedder'}")
        return results

    def _record(self, record: dict[str, Any]) -> None:
        write_atomic(self.run_dir / "run.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        write_atomic(self.run_dir / "config.resolved.yaml", loading.to_yaml(self.config).encode())


def run_config(
    path: str,
    overrides: list[str],
    *,
    only: str | None = None,
    dry_run: bool = False,
    allow_restart: bool = False,
) -> dict[str, Any] | None:
    """Loads a configuration and runs it: what `llmr run` and the scripts in jobs/ call. Returns what `run` does."""
    console = terminal()
    config = loading.load(path, overrides)
    pipeline = Pipeline(config, console, allow_restart=allow_restart)
    if dry_run:
        console.print(loading.to_yaml(config))
        for row in pipeline.describe():
            console.print(f"{row['stage']:14} {row['state']:20} {row['artifact']}")
        console.print(in_words(pipeline.costs(), exact=pipeline.is_mined))
        return None
    command = " ".join(["llmr run", path, *overrides, *([f"--stage {only}"] if only else [])])
    with stopping.stoppable(command), cluster.or_lost(command):
        return pipeline.run(command, only)


def index_of(path: str, overrides: list[str], embedder: str) -> tuple[Artifact, str, str]:
    """The index of one of a run's embedders, what embeds its queries (collection.create's `model`), the artifact root.

    Raises:
        ConfigError: the run has no such embedder.
    """
    config = loading.load(path, overrides)
    pipeline = Pipeline(config, terminal(quiet=True))
    indexes = [name for name in pipeline.by_name if name.startswith("index_")]
    if f"index_{embedder}" not in indexes:
        known = ", ".join(name.removeprefix("index_") for name in indexes)
        raise ConfigError(f"run {config.name} has no embedder '{embedder}'. Known: {known}.")
    model: asset_catalogue.Asset = pipeline.by_name[f"embed_{embedder}"].inputs["embedder"]
    # A checkpoint's id stands for its weights; it is what the store knows it by.
    name = model.fingerprint if model.path.is_relative_to(config.runtime.artifact_root) else model.name
    return pipeline.by_name[f"index_{embedder}"].artifact, name, config.runtime.artifact_root


def evaluate_endpoint(path: str, overrides: list[str], url: str, key: str, method: str) -> endpoint.Comparison:
    """Measures a served collection as a finished run was measured; writes ``served.json`` into the run's folder.

    Args:
        path: the run's configuration.
        overrides: settings that go with it.
        url: of the server.
        key: an API key of it; empty: it needs none.
        method: whose rankings the server's are compared with.

    Raises:
        DataError: the run's evaluation is not finished.
        RequestRefusedError: the server refuses a query.
        ServerUnavailableError: it does not answer.
    """
    from llmr_ray.clients import Client

    config = loading.load(path, overrides)
    pipeline = Pipeline(config, terminal(quiet=True))
    evaluated = pipeline.by_name["evaluate"].artifact
    with Client(url, key) as client:
        found = endpoint.compare(
            pipeline.prepared.read("queries").to_pylist(),
            relevance_by_query(pipeline.prepared.read("qrels")),
            evaluated.read("run"),
            method,
            client,
            depth=config.evaluate.search_depth,
        )
    write_atomic(pipeline.run_dir / "served.json", (json.dumps(found.to_dict(), indent=1) + "\n").encode())
    return found


def write_audit_of(path: str, overrides: list[str]) -> Path:
    """Writes a run's audit.html again, from what it has made so far; returns its path.

    Raises:
        DataError: the run has no rewards yet, or its configuration wants no such page.
    """
    config = loading.load(path, overrides)
    pipeline = Pipeline(config, terminal(quiet=True))
    if audit_page.write_audit(pipeline.run_dir, config, pipeline.finished()) is None:
        raise DataError(
            f"run {config.name} has no rewards to audit, or report.audit_queries is 0. Run it up to the stage 'reward'."
        )
    return pipeline.run_dir / "audit.html"


def plan_config(path: str, overrides: list[str], *, probe: bool, tokens_per_second: float) -> None:
    """Prints what a configuration's LLM feedback will cost, also where its models and data are not at hand."""
    config, console = loading.load(path, overrides), terminal()
    try:
        pipeline = Pipeline(config, console)
    except ResourceError as missing:
        if probe:
            raise
        console.print(f"From the configuration alone, for something it names is not here: {missing}")
        scorers = list(config.all_annotators)
        rounds = range(1, config.rounds + 1)
        costs = planning.question_costs(config)
        costs += [cost for number in rounds for name in scorers for cost in _upper_costs(name, number, config)]
        _print_costs(console, config, costs, exact=False)
        _print_hours(console, config, costs, tokens_per_second)
        return
    command = " ".join(["llmr plan", path, *overrides])
    with stopping.stoppable(command), cluster.or_lost(command):
        try:
            pipeline.plan(probe=probe, tokens_per_second=tokens_per_second)
        finally:
            pipeline.client.close()


def _upper_costs(annotator: str, number: int, config: Config) -> list[TaskCost]:
    return _named(planning.upper_costs(config, again=number > 1), annotator, number, config)


def _named(costs: Sequence[TaskCost], annotator: str, number: int, config: Config) -> list[TaskCost]:
    """Costs of a scoring, with what tells it from others where there are any: who scores, and the round."""
    told = f", {annotator}" if annotator != LLM else ""
    told += f", round {number}" if config.rounds > 1 else ""
    return [replace(cost, task=cost.task + told) for cost in costs]


def in_words(costs: Sequence[TaskCost], *, exact: bool) -> str:
    """What LLM feedback has still to be paid, in one line."""
    if not costs:
        return "LLM feedback: nothing to pay."
    pairs, missing, tokens = (sum(getattr(cost, what) for cost in costs) for what in ("pairs", "missing", "tokens"))
    if exact:
        return f"LLM feedback: {missing:,} of {pairs:,} pairs still to pay, about {tokens:,} tokens."
    return f"LLM feedback: at most {pairs:,} pairs and {tokens:,} tokens (exact once candidates are mined)."


def _print_costs(console: Console, config: Config, costs: Sequence[TaskCost], *, exact: bool) -> None:
    view = Table(title=f"{config.name}: LLM feedback still to pay")
    for heading in ("task", "feedback", "pairs", "missing", "tokens"):
        view.add_column(heading, justify="left" if heading in ("task", "feedback") else "right")
    for cost in costs:
        numbers = (f"{number:,}" for number in (cost.pairs, cost.missing, cost.tokens))
        view.add_row(cost.task, cost.feedback, *numbers)
    console.print(view)
    console.print(in_words(costs, exact=exact))


def _print_hours(console: Console, config: Config, costs: Sequence[TaskCost], tokens_per_second: float) -> None:
    if tokens_per_second <= 0:
        return
    actors = max(1, config.runtime.llm_actors)
    hours = sum(cost.tokens for cost in costs) / tokens_per_second / 3600
    console.print(
        f"at {tokens_per_second:,.0f} tokens/s an actor: {hours / actors:,.2f} hours on {actors} actors, "
        f"{hours * config.runtime.llm_gpus:,.2f} GPU hours"
    )


def fetch_assets(path: str, overrides: list[str]) -> None:
    """Fetches every model and data set that a configuration names."""
    console = terminal()
    config = loading.load(path, overrides)
    for asset in asset_catalogue.fetch(_asset_names(config), config.runtime.cache_root):
        console.print(f"{asset.kind:6} {asset.name:24} {asset.path}")


def _asset_names(config: Config) -> list[str]:
    names = [config.embedder.model, config.llm.model, config.reward_model.model]
    names += [llm.model for llm in (config.reader, *config.annotators.values()) if llm is not None]
    compared = config.evaluate.embedders
    names += [compared[name].model for name in config.evaluate.methods if name in compared]
    names += [dataset.path for dataset in config.datasets.values()]
    return list(dict.fromkeys(filter(None, names)))


def _state(artifact: Artifact) -> str:
    if artifact.is_done:
        return "done"
    shards = len(artifact.ledger())
    return f"partial ({shards} shards)" if shards else "missing"


def _commit() -> str:
    """The checkout's revision, with ``+dirty`` when tracked files differ; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=folder, capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+dirty" if dirty else "")


def _versions() -> dict[str, str]:
    packages = ("llmr_ray", "ray", "torch", "transformers", "sentence-transformers", "pyarrow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
