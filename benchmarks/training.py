"""Training against sentence-transformers and FlagEmbedding: examples per second, memory, useful share of the machine.

    python benchmarks/training.py                       # all workloads; the peers' batching is swept first
    python benchmarks/training.py --workloads mixed_contrastive --rounds 3 --peers default

All train the sample MiniLM-L6 in float32 on the same batches: one query and seven documents an example, the same
initial weights, loss, optimiser, learning rate and warm-up, dropout off. The peers (`pip install datasets
FlagEmbedding`; those that are not there are left out) are SentenceTransformerTrainer with MultipleNegativesRankingLoss
or DistillKLDivLoss, and FlagEmbedding's trainer, contrastive alone. They pad on a CPU; what they document for batching
is swept where the loss stays the same, and the fastest is compared. Ours is training.step.Trainer, with tokenising
counted, since the peers tokenise while they train. Tevatron is not compared.

On processors where our linear layers run by oneDNN (llmr_ray/modeling/linear.py) `ours_plain` says what we are without,
by the products that the peers use. The share of the machine is always that of the faster library's product.

`mixed` lengths are lognormal, of which padding to the longest wastes about 58%; `equal` lengths leave nothing to save.
`workers` compares two of our workers (gloo, DDP) with one, after three steps that are not counted, because workers
start cold. Each contender is a process of its own; rounds take turns, and a ratio is the median over rounds of CPU
seconds of the same round. Where a contender's losses differ from ours by more than 1e-4 the ratio is void. A float32
matrix product is timed before and after each turn: where that varies by more than 15% the machine was not quiet, and no
ratio is given unless --noisy asks for it.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from contender import Contender, gemm_gflops, gemm_spread, record, serve, spent
from training_peers import flag_embedding, sentence_transformers, variants_of
from training_workloads import (
    BATCH_SIZE,
    DOCUMENTS,
    MAX_TOKENS,
    SEED,
    TEMPERATURE,
    WORKLOADS,
    make_examples,
    padding_waste,
    train_config,
    useful_flops,
)

RESULTS = Path(__file__).parent / "results" / "training.json"
TOLERANCE, GEMM_SPREAD = 1e-4, 0.15
GEMM = (1024, 384, 1536)


# --- ours ------------------------------------------------------------------------------------------------------------


def write_data(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Our training data: tokenised once, before the first step. Returns what that cost."""
    from llmr_ray.schemas import table_of
    from llmr_ray.training.dataset import write_shard

    rows = [
        {
            "query_id": f"q{number}",
            "task": "task",
            "dataset": "data",
            "query": example["query"],
            "doc_ids": [f"q{number}-{place}" for place in range(DOCUMENTS)],
            "docs": example["docs"],
            "roles": ["gold", *["candidate"] * (DOCUMENTS - 1)],
            "rewards": example["scores"],
        }
        for number, example in enumerate(job["examples"])
    ]
    embedder = load_embedder(Path(job["model"]))
    with spent() as tokenising:
        write_shard(
            table_of("groups", rows),
            folder,
            tokenize=lambda texts, instruction, limit: embedder.tokenize(
                texts, instruction=instruction, max_tokens=limit
            ),
            instructions={"task": ("", "")},
            max_query_tokens=MAX_TOKENS,
            max_document_tokens=MAX_TOKENS,
        )
    return tokenising


def load_embedder(folder: Path) -> Any:
    """Ours, in float32 on the CPU."""
    from llmr_ray.modeling.embedder import Embedder

    return Embedder(
        folder, max_query_tokens=MAX_TOKENS, max_document_tokens=MAX_TOKENS, precision="float32", device="cpu"
    )


def make_trainer(job: dict[str, Any], data: Path, root: Path) -> Any:
    """Our trainer at its first step."""
    from llmr_ray.config import TaskTrain
    from llmr_ray.training.bi_encoder import EmbedderRecipe
    from llmr_ray.training.dataset import read_training_data
    from llmr_ray.training.step import Trainer

    # The peer multiplies its loss by the square of the temperature.
    is_distilled = job["loss"] == "distill"
    weights: dict[str, Any] = {"kl_weight": TEMPERATURE**2} if is_distilled else {"contrastive_weight": 1.0}
    root.mkdir(exist_ok=True)
    return Trainer(
        base=Path(job["model"]),
        recipe=EmbedderRecipe(
            train=train_config(job["batch_size"], job["uncounted_steps"] + job["steps"]),
            seed=SEED,
            tasks={"task": TaskTrain(positive="first", negatives="first", **weights)},
            max_query_tokens=MAX_TOKENS,
            max_document_tokens=MAX_TOKENS,
            precision="float32",
        ),
        data=read_training_data([data]),
        root=root,
        device="cpu",
    )


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with one worker."""
    with tempfile.TemporaryDirectory() as folder:
        tokenising = write_data(job, Path(folder) / "data")
        trainer = make_trainer(job, Path(folder) / "data", Path(folder) / "run")
        losses, training = train(trainer, job)
    if not job["uncounted_steps"]:
        training |= {name: training[name] + tokenising[name] for name in ("cpu", "wall")}
    return {**training, "losses": losses}


def train(trainer: Any, job: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
    """The losses of all steps, and what those that count have cost."""
    losses = [trainer.train_step()["loss"] for _ in range(job["uncounted_steps"])]
    with spent() as training:
        losses += [trainer.train_step()["loss"] for _ in range(job["steps"])]
    return losses, training


def ours_plain(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with one worker whose linear layers are PyTorch's own."""
    with mock.patch("llmr_ray.modeling.linear.is_faster", return_value=False):
        return ours(job)


def two_workers(job: dict[str, Any]) -> dict[str, Any]:
    """Trains with two workers; CPU seconds are those of both, without tokenising.

    ``products_at_once`` is the speed of a matrix product in both at the same time, in billions of operations per
    second: virtual processors may share the units that multiply, and then two workers cannot be faster than one.
    """
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(job, folder / "data")
        spawn(_worker, args=(2, job, folder), nprocs=2)
        told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    total = {name: sum(one[name] for one in told) for name in ("cpu", "peak_mb", "products_at_once")}
    return total | {"wall": max(one["wall"] for one in told), "losses": told[0]["losses"]}


def _worker(rank: int, world_size: int, job: dict[str, Any], folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(job["threads"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)
    _train_worker(rank, job, folder)
    dist.barrier()
    dist.destroy_process_group()


def _train_worker(rank: int, job: dict[str, Any], folder: Path) -> None:
    import torch.distributed as dist

    trainer = make_trainer(job, folder / "data", folder / "run")
    dist.barrier()
    losses, training = train(trainer, job)
    dist.barrier()
    together = gemm_gflops(*GEMM)
    (folder / f"{rank}.json").write_text(json.dumps({**training, "losses": losses, "products_at_once": together}))


# --- processes -------------------------------------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": ours,
    "ours_plain": ours_plain,
    "ours_2": two_workers,
    "sentence_transformers": sentence_transformers,
    "flag_embedding": flag_embedding,
}
PEERS = {"sentence_transformers": "datasets", "flag_embedding": "FlagEmbedding"}
"""What a peer's trainer needs installed beside this package."""


# --- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the benchmark and writes what it finds into benchmarks/results/training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", choices=("sweep", "default", "none"), default="sweep")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="queries of a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--noisy", action="store_true", help="give ratios on a machine that is not quiet, marked so")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(lambda: CONTENDERS[options.serve], options.threads, GEMM)
        return
    missing = [name for name, needed in PEERS.items() if not importlib.util.find_spec(needed)]
    if options.peers != "none" and len(missing) == len(PEERS):
        parser.error("the peers need `pip install datasets FlagEmbedding`; --peers none measures ours alone")
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name in CONTENDERS:
            if name in missing:
                continue
            contenders[name] = Contender(__file__, name, options.threads)
            stack.callback(contenders[name].close)
        for name in options.workloads:
            batch = "" if options.batch_size == BATCH_SIZE else f"_batch_{options.batch_size}"
            record(RESULTS, name + batch, run_workload(name, options, contenders))


def run_workload(name: str, options: argparse.Namespace, contenders: dict[str, Contender]) -> dict[str, Any]:
    """Rounds of one workload, and what they say."""
    from llmr_ray.assets import resolve
    from llmr_ray.modeling.linear import is_faster

    model = str(resolve(options.model).path)
    uncounted = 3 if name == "workers" else 0
    number = options.batch_size * options.steps
    examples = make_examples(name, number + uncounted * options.batch_size, model)
    job = {
        "model": model,
        "loss": "distill" if name.endswith("distill") else "contrastive",
        "steps": options.steps,
        "uncounted_steps": uncounted,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "examples": examples,
        "variant": {},
    }
    waste = padding_waste(examples, options.batch_size)
    print(f"\n{name}: {WORKLOADS[name]}; {number} examples, padding wastes {waste:.0%}", flush=True)
    found: dict[str, Any] = {"examples": number, "padding_waste": waste}
    taking_part = {"ours": (contenders["ours"], job)}
    if is_faster() and name != "workers":
        taking_part["ours_plain"] = (contenders["ours_plain"], job)
    if name == "workers":
        taking_part["ours_2"] = (contenders["ours_2"], job)
    elif options.peers != "none":
        for peer in (peer for peer in PEERS if peer in contenders):
            if variants := variants_of(peer, job["loss"], options.batch_size):
                best, swept = best_variant(contenders[peer], job, variants, sweep=options.peers == "sweep")
                found |= {f"{peer}_batching": best, f"{peer}_sweep_cpu_seconds": swept}
                taking_part[peer] = (contenders[peer], {**job, "variant": variants[best]})
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in taking_part}
    for turn in range(options.rounds + 1):
        for contender, (process, own_job) in taking_part.items():
            told = process.ask(own_job)
            if turn:  # the first round warms up
                runs[contender].append(told)
    flops = useful_flops(examples, model) * number / len(examples)
    found |= summary(runs, flops, number, options.noisy)
    if name == "workers":
        limit = statistics.median(run["products_at_once"] for run in runs["ours_2"]) / found["gemm_gflops"]
        turns = zip(runs["ours"], runs["ours_2"], strict=True)
        faster = statistics.median(alone["wall"] / both["wall"] for alone, both in turns)
        print(
            f"  two workers are {faster:.2f}x as fast as one; matrix products of two at once {limit:.2f}x", flush=True
        )
        found |= {"two_workers_speed": faster, "two_products_speed": limit}
    return found


def best_variant(
    peer: Contender, job: dict[str, Any], variants: dict[str, dict[str, Any]], *, sweep: bool
) -> tuple[str, dict[str, float]]:
    """The fastest of a peer's ways to batch on one step (without a sweep the first), and the CPU seconds of each."""
    if not sweep:
        return next(iter(variants)), {}
    short = {**job, "steps": 1, "examples": job["examples"][: job["batch_size"]]}
    peer.ask(short)  # warms up
    cpu = {told: float(peer.ask({**short, "variant": variant})["cpu"]) for told, variant in variants.items()}
    told = ", ".join(f"{told} {seconds:.2f} CPU s" for told, seconds in cpu.items())
    print(f"  sweep of {peer.name}: {told}", flush=True)
    return min(cpu, key=lambda told: cpu[told]), cpu


def summary(runs: dict[str, list[dict[str, Any]]], flops: float, number: int, is_noise_allowed: bool) -> dict[str, Any]:
    """Figures of all contenders, printed as a table."""
    peak, spread = gemm_spread([run for own in runs.values() for run in own])
    is_quiet = spread <= GEMM_SPREAD
    reference, figures = runs["ours"], dict[str, Any]()
    for contender, own in runs.items():
        cpu, wall = (statistics.median(run[what] for run in own) for what in ("cpu", "wall"))
        pairs = zip(own[0]["losses"], reference[0]["losses"], strict=True)
        differs = max(abs(a - b) / abs(b) for a, b in pairs)
        ratios = sorted(run["cpu"] / mine["cpu"] for run, mine in zip(own, reference, strict=True))
        walls = sorted(run["wall"] / mine["wall"] for run, mine in zip(own, reference, strict=True))
        is_given = differs <= TOLERANCE and (is_quiet or is_noise_allowed)
        figures[contender] = {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "examples_per_cpu_second": number / cpu,
            "useful_share_of_gemm": statistics.median(
                flops / run["cpu"] / statistics.mean(run["gemm"]) / 1e9 for run in own
            ),
            "peak_mb": max(run["peak_mb"] for run in own),
            "losses": own[0]["losses"],
            "loss_difference": differs,
            "cpu_of_it_per_cpu_of_ours": statistics.median(ratios) if is_given else None,
            "cpu_ratios": ratios if is_given else None,
            "wall_of_it_per_wall_of_ours": statistics.median(walls) if is_given else None,
        }
        one = figures[contender]
        verdict = "no ratio"
        if is_given:
            verdict = (
                f"{statistics.median(ratios):.2f}x the CPU s of ours [{ratios[0]:.2f}, {ratios[-1]:.2f}], "
                f"{statistics.median(walls):.2f}x the time [{walls[0]:.2f}, {walls[-1]:.2f}]"
            )
        print(
            f"  {contender:22} {cpu:7.2f} CPU s {wall:7.2f} s {number / cpu:7.1f} examples/CPU s  "
            f"{one['useful_share_of_gemm']:.2f} of GEMM  {one['peak_mb']:6.0f} MB  differs {differs:.0e}"
            f"{'  VOID' if differs > TOLERANCE else ''}  {verdict}"
        )
    noise = "" if is_quiet else ": not a quiet machine"
    print(f"  matrix products {peak:.0f} GFLOP/s, spread {spread:.0%}{noise}", flush=True)
    return {"gemm_gflops": peak, "gemm_spread": spread, "is_quiet": is_quiet, "contenders": figures}


if __name__ == "__main__":
    main()
