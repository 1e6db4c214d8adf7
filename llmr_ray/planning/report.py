"""What `llmr plan` shows of a plan and of its simulation: tables of plain text, and the same as JSON values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llmr_ray.config import Config
from llmr_ray.planning.counts import num_documents, num_index_nodes
from llmr_ray.planning.hardware import GPUS, Assumptions, gpu_of
from llmr_ray.planning.models import size_of
from llmr_ray.planning.simulation import COUNTS, Scaling, simulate
from llmr_ray.planning.stages import plan
from llmr_ray.planning.work import Work


def told(config: Config, assumed: Assumptions, *, gpu: str, simulated: bool) -> dict[str, Any]:
    """Everything as JSON values: stages with hours by GPU kind, totals, assumptions, and the simulation on one kind.

    Raises:
        ConfigError: there is no such GPU.
    """
    kind = gpu_of(gpu)
    works = plan(config, assumed)
    result: dict[str, Any] = {
        "name": config.name,
        "assumed": asdict(assumed),
        "guessed_sizes": [name for name in _models(config) if not size_of(name).is_known],
        "stages": [_stage(work, assumed) for work in works],
        "gpu_hours": {name: sum(work.gpu_hours(of, assumed) for work in works) for name, of in GPUS.items()},
        "storage_bytes": sum(work.storage_bytes for work in works),
        "documents": num_documents(config, assumed),
        "index_nodes": num_index_nodes(config, assumed, config.embedder),
    }
    if simulated:
        result["simulation"] = {"gpu": gpu, "stages": [_scaling(one) for one in simulate(works, kind, assumed)]}
    return result


def text(plan_told: dict[str, Any]) -> str:
    """The same for a terminal."""
    stages = plan_told["stages"]
    rows = [["stage", "work", "tokens", "FLOPs", "core hours", "each GPU", "each node", "storage"]]
    for stage in stages:
        numbers = [_short(stage["tokens"]), _short(stage["flops"]), _core_hours(stage["cpu_seconds"])]
        kept = [_bytes(stage[name]) for name in ("memory_bytes", "node_bytes", "storage_bytes")]
        rows.append([stage["stage"], f"{_short(stage['units'])} {stage['unit']}", *numbers, *kept])
    flops, seconds = (sum(stage[name] for stage in stages) for name in ("flops", "cpu_seconds"))
    rows.append(["all", "", "", _short(flops), _core_hours(seconds), "", "", _bytes(plan_told["storage_bytes"])])
    parts = [f"{plan_told['name']}: the work of each stage, from the configuration alone", *_aligned(rows), ""]
    rows = [["GPU hours", *GPUS]]
    rows += [
        [stage["stage"], *(_hours(stage["gpu_hours"][name]) + _mark(stage, name) for name in GPUS)]
        for stage in stages
        if stage["flops"]
    ]
    rows.append(["all", *(_hours(plan_told["gpu_hours"][name]) for name in GPUS)])
    assumed = plan_told["assumed"]
    parts += [*_aligned(rows), ""]
    parts.append(
        f"Assumed: {assumed['utilisation']:.0%} of peak products, {assumed['bandwidth_utilisation']:.0%} of bandwidth, "
        f"texts at {assumed['fill']:.0%} of their limits, cores of {assumed['core_flops'] / 1e9:.0f} GFLOP/s. "
        f"{plan_told['documents']:,} documents: an exact index takes "
        f"{plan_told['index_nodes']} nodes of {assumed['node_memory_gb']:,.0f} GB."
    )
    parts += _warnings(stages, assumed["node_memory_gb"])
    if guessed := plan_told["guessed_sizes"]:
        parts.append(f"Sizes guessed from names: {', '.join(guessed)}.")
    if "simulation" in plan_told:
        parts += ["", *_simulated(plan_told["simulation"])]
    return "\n".join(parts)


def _mark(stage: dict[str, Any], gpu: str) -> str:
    return "!" if gpu in stage["too_small"] else ""


def _warnings(stages: Sequence[dict[str, Any]], node_memory_gb: float) -> list[str]:
    """What does not fit, a line each."""
    found = []
    for stage in stages:
        name = stage["stage"]
        if stage["too_small"]:
            needed, kinds = _bytes(stage["memory_bytes"]), ", ".join(stage["too_small"])
            found.append(f"! {name} takes {needed} of each GPU, which {kinds} do not have: {stage['remedy']}.")
        if stage["node_bytes"] > node_memory_gb * 1e9:
            found.append(
                f"! {name} opens {_bytes(stage['node_bytes'])} on each node, more than the {node_memory_gb:,.0f} GB "
                "assumed: what does not fit is read from storage again and again."
            )
    return found


def _simulated(simulation: dict[str, Any]) -> list[str]:
    rows = [["hours on", *(f"{count} GPUs" for count in COUNTS), "stops scaling"]]
    totals = dict.fromkeys(COUNTS, 0.0)
    for stage in simulation["stages"]:
        hours = {int(count): seconds / 3600 for count, seconds in stage["seconds"].items()}
        totals = {count: totals[count] + hours[count] for count in COUNTS}
        at = f"at {stage['stops_at']}: {stage['reason']}" if stage["stops_at"] else "–"
        rows.append([stage["stage"], *(_hours(hours[count]) for count in COUNTS), at])
    rows.append(["all", *(_hours(totals[count]) for count in COUNTS), ""])
    efficiency = [f"{totals[COUNTS[0]] / max(1e-9, totals[count]) / count:.0%}" for count in COUNTS]
    rows.append(["efficiency", *efficiency, ""])
    return [f"Simulated on {simulation['gpu']}, stages one after the other:", *_aligned(rows)]


def _stage(work: Work, assumed: Assumptions) -> dict[str, Any]:
    hours = {name: work.gpu_hours(gpu, assumed) for name, gpu in GPUS.items()}
    too_small = [name for name, gpu in GPUS.items() if not work.fits(gpu)]
    return asdict(work) | {"gpu_hours": hours, "too_small": too_small}


def _scaling(one: Scaling) -> dict[str, Any]:
    return {
        "stage": one.stage,
        "seconds": {str(count): time.seconds for count, time in one.times.items()},
        "workers": {str(count): time.workers for count, time in one.times.items()},
        "parts": {str(count): time.parts for count, time in one.times.items()},
        "stops_at": one.stops_at,
        "reason": one.reason,
    }


def _models(config: Config) -> list[str]:
    models = [config.embedder.model, config.llm.model, (config.reader or config.llm).model, config.reward_model.model]
    models += [llm.model for llm in config.annotators.values()]
    compared = config.evaluate.embedders
    models += [compared[name].model for name in config.evaluate.methods if name in compared]
    return [name for name in dict.fromkeys(models) if name]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns: the first and every one with words to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lefts = {0} | {place for place, heading in enumerate(rows[0]) if heading in ("work", "stops scaling")}
    return [
        "  ".join(
            cell.ljust(width) if place in lefts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _short(number: float) -> str:
    """Three digits and a unit: 1.23M, or 4.56e18 beyond tera."""
    if number >= 1e15:
        return f"{number:.1e}".replace("e+", "e")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}" if number else "–"


def _bytes(number: float) -> str:
    return f"{_short(number)}B" if number else "–"


def _core_hours(seconds: float) -> str:
    return _hours(seconds / 3600) if seconds else "–"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.3f}"
