"""Exact search against one FAISS Flat on the same cores, and approximate kinds through our API against FAISS's own.

    python benchmarks/index.py                                     # both parts
    python benchmarks/index.py --workloads exact --documents 100000 --rounds 3

exact: `flat` and `int8` are our shards in one process (runtime.index_scan), `actors` and `actors_int8` the search over
Ray actors, as many as threads. Each must give the same ids and scores as the NumPy oracle (on a sample) and as each
other, and FAISS's ids except where it breaks ties or rounds differently; a failed gate voids the ratio. Ratios are
FAISS's seconds over ours, so 2 is twice as fast: CPU seconds, and wall seconds where there are actors. `merge_share` is
what merging the shards' results takes of the search.

approximate: each kind is built once, then its search through our shards (proposed, then scored exactly) is compared
with FAISS's own search of the same structure at the same effort, which scores by codes; recall@10 of both.

Vectors are drawn: clusters with noise, unit norm. Each contender of `exact` is a process of its own; rounds take turns,
and a ratio is the median over rounds. A float32 matrix product is timed before and after each turn: where that varies
by more than 15% the machine was not quiet, and no ratio is given unless --noisy asks for it.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from contender import Contender, gemm_gflops, gemm_spread, record, serve, spent, take_turns

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, sha256_text

RESULTS = Path(__file__).parent / "results" / "index.json"
GEMM_SPREAD, AGREEMENT = 0.15, 0.99
GEMM = (1024, 384, 1536)
SPEC = ArtifactSpec(stage="index", version=1, config={}, inputs={"embeddings": "embed/benchmark"})
CONTENDERS = ("faiss", "flat", "int8", "actors", "actors_int8")


def vectors(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Unit vectors: clusters of very different sizes, with noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((1000, dimension), dtype=np.float32)
    drawn = np.minimum(rng.geometric(0.004, rows), len(centres)) - 1
    found = centres[drawn] + 1.2 * rng.standard_normal((rows, dimension), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def build(folder: Path, docs: np.ndarray, num_shards: int) -> Artifact:
    """An exact index as the stage writes it."""
    from llmr_ray.index import shards

    index = Artifact(folder, SPEC)
    index.begin()
    cuts = [len(docs) * cut // num_shards for cut in range(num_shards + 1)]
    for number, (start, end) in enumerate(pairwise(cuts)):
        path = index.file(shards.file_name(number))
        shards.write_shard(docs[start:end], path)
        rows = range(start, end)
        ids = pa.table({"row": pa.array(rows, pa.int64()), "doc_id": [str(row) for row in rows]})
        counts = Counts(rows_in=end - start, ok=end - start)
        index.write_shard(number, {"ids": ids}, counts, files=(f"files/{path.name}",))
    index.commit(num_shards, seconds=0, extra={"encoder": "benchmark", "cuts": cuts})
    return index


# --- contenders ------------------------------------------------------------------------------------------------------


def opened(name: str, options: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """What does a job of a contender: searches, and says what that cost; with `told`, what was found as well."""
    queries = vectors(options.queries, options.dimension, 2)
    search, merge = SEARCHES[name](options, queries)

    def work(job: dict[str, Any]) -> dict[str, Any]:
        with spent() as cost:
            rows, scores = search()
        told: dict[str, Any] = {**cost}
        if merge is not None:
            started = time.process_time()
            merge()
            told["merge"] = time.process_time() - started
        if job["told"]:
            told |= {"rows": rows.tolist(), "scores": scores.tolist()}
        return told

    return work


def with_faiss(options: argparse.Namespace, queries: np.ndarray) -> Any:
    """One IndexFlatIP of everything."""
    import faiss

    faiss.omp_set_num_threads(options.threads)
    flat = faiss.IndexFlatIP(options.dimension)
    flat.add(vectors(options.documents, options.dimension, 1))
    return lambda: flat.search(queries, options.k)[::-1], None


def with_shards(scan: str) -> Any:
    """Our shards, one after the other in this process."""

    def ready(options: argparse.Namespace, queries: np.ndarray) -> Any:
        from llmr_ray.index import shards
        from llmr_ray.index.topk import merge_topk

        shards.set_threads(options.threads)
        how = shards.Opening(scan=scan, num_threads=options.threads)
        held = shards.open_shards(Artifact(options.folder, SPEC), range(options.shards), how=how)
        scopes = np.tile([[0, options.documents]], (len(queries), 1))
        parts = [shard.search(queries, scopes, options.k) for shard in held]
        return lambda: shards.search_all(held, queries, scopes, options.k), lambda: merge_topk(parts, options.k)

    return ready


def with_actors(scan: str) -> Any:
    """Our shards over Ray actors of one thread each."""

    def ready(options: argparse.Namespace, queries: np.ndarray) -> Any:
        from llmr_ray import cluster
        from llmr_ray.config import Config, RuntimeConfig
        from llmr_ray.index.searcher import Searcher

        runtime = RuntimeConfig(index_actors=options.threads, index_threads=1, index_scan=scan)
        cluster.start(runtime)
        searcher = Searcher(Config(runtime=runtime), Artifact(options.folder, SPEC))
        scopes = np.tile([[0, options.documents]], (len(queries), 1))
        searcher.search(queries, scopes, options.k)
        return lambda: searcher.search(queries, scopes, options.k), None

    return ready


SEARCHES: dict[str, Any] = {
    "faiss": with_faiss,
    "flat": with_shards("float32"),
    "int8": with_shards("int8"),
    "actors": with_actors("float32"),
    "actors_int8": with_actors("int8"),
}


# --- exact -----------------------------------------------------------------------------------------------------------


def exact(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of the contenders on one index."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        docs = vectors(options.documents, options.dimension, 1)
        build(Path(folder), docs, options.shards)
        sizes = [f"--{name}={getattr(options, name)}" for name in ("documents", "dimension", "queries", "k", "shards")]
        running = {}
        for name in options.contenders:
            running[name] = Contender(__file__, name, options.threads, f"--folder={folder}", *sizes)
            stack.callback(running[name].close)
        told = {name: contender.ask({"told": True}) for name, contender in running.items()}
        failed = gate(told, docs, options)
        del docs
        runs = take_turns(running, options.rounds, {"told": False})
    return figures(runs, failed, options)


def gate(told: dict[str, dict[str, Any]], docs: np.ndarray, options: argparse.Namespace) -> dict[str, str]:
    """What is wrong with a contender's answer, by its name."""
    from llmr_ray.index.topk import exact_topk

    sample = 8
    queries = vectors(options.queries, options.dimension, 2)[:sample]
    oracle = exact_topk(queries, docs, np.tile([[0, len(docs)]], (sample, 1)), options.k)
    failed = {}
    answers = {name: sha256_text(str((answer["rows"], answer["scores"]))) for name, answer in told.items()}
    ours = [name for name in told if name != "faiss"]
    for name in ours:
        rows, scores = np.asarray(told[name]["rows"]), np.asarray(told[name]["scores"], np.float32)
        agreement = float((rows == np.asarray(told["faiss"]["rows"])).mean())
        if not (np.array_equal(rows[:sample], oracle[0]) and np.array_equal(scores[:sample], oracle[1])):
            failed[name] = "is not the oracle's result"
        elif answers[name] != answers[ours[0]]:
            failed[name] = f"differs from {ours[0]}"
        elif agreement < AGREEMENT:
            failed[name] = f"only {agreement:.4f} of FAISS's ids"
    return failed


def figures(
    runs: dict[str, list[dict[str, Any]]], failed: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Medians and ratios, printed and returned."""
    peak, spread = gemm_spread([run for own in runs.values() for run in own])
    is_quiet = spread <= GEMM_SPREAD
    found: dict[str, Any] = {}
    print(f"exact: {options.documents} x {options.dimension}, {options.queries} queries, k={options.k}")
    for name, own in runs.items():
        clock = "wall" if name.startswith("actors") else "cpu"
        entry: dict[str, Any] = {
            what: statistics.median(run[what] for run in own) for what in ("cpu", "wall", "peak_mb")
        }
        if "merge" in own[0]:
            entry["merge_share"] = statistics.median(run["merge"] / run["cpu"] for run in own)
        if name in failed:
            entry["gate"] = failed[name]
        elif name != "faiss" and (is_quiet or options.noisy):
            ratios = [theirs[clock] / mine[clock] for theirs, mine in zip(runs["faiss"], own, strict=True)]
            entry |= {"faiss_over_ours": statistics.median(ratios), "ratios": ratios, "clock": clock}
        found[name] = entry
        shown = ", ".join(f"{key} {value:.3g}" for key, value in entry.items() if isinstance(value, float))
        print(f"  {name:12} {shown}{'; GATE FAILED: ' + failed[name] if name in failed else ''}")
    print(f"  matrix products {peak:.0f} GFLOP/s, spread {spread:.0%}{'' if is_quiet else ': not a quiet machine'}")
    return {
        "settings": {
            name: getattr(options, name) for name in ("documents", "dimension", "queries", "k", "shards", "threads")
        },
        "gemm_gflops": peak,
        "gemm_spread": spread,
        "is_quiet": is_quiet,
        "contenders": found,
    }


# --- approximate -----------------------------------------------------------------------------------------------------


def approximate_kinds(options: argparse.Namespace) -> dict[str, Any]:
    """Each kind: what building costs, its recall, and its speed through our shards against FAISS's own search."""
    from llmr_ray.artifacts import sha256_file
    from llmr_ray.index import approximate, recall, shards
    from llmr_ray.index.settings import IndexConfig

    shards.set_threads(options.threads)
    docs = vectors(options.documents, options.dimension, 1)
    queries = vectors(options.queries, options.dimension, 2)
    scopes, k = np.tile([[0, len(docs)]], (len(queries), 1)), 10
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.faiss"
        shards.write_shard(docs, path)
        shard = shards.Shard(path, 0, sha256_file(path))
        exact_scores = shard.search(queries, scopes, k)[1]
        for kind in options.kinds:
            settings, files = IndexConfig(kind=kind), (Path(folder) / f"{kind}.trained", Path(folder) / kind)
            with spent() as cost:
                approximate.write_trained(
                    lambda rows: docs[np.random.default_rng(3).choice(len(docs), rows, replace=False)],
                    len(docs),
                    options.dimension,
                    settings,
                    42,
                    files[0],
                )
                approximate.write_proposals(docs, files[0], settings, files[1])
            shard.proposals = approximate.Proposals(files[1], sha256_file(files[1]), settings, 1)
            measured = recall.measure([shard], queries, settings)
            proposals = shard.proposals
            num = max(k + shards.SPARE, k * proposals.refine)
            ratios, products = [], []
            for _ in range(options.rounds):
                products.append(gemm_gflops(*GEMM))
                with spent() as theirs:
                    proposals.propose(queries, num)
                with spent() as mine:
                    scores = shard.search(queries, scopes, k)[1]
                ratios.append(theirs["cpu"] / mine["cpu"])
            products.append(gemm_gflops(*GEMM))
            spread = (max(products) - min(products)) / statistics.median(products)
            entry = {
                "build_cpu": cost["cpu"],
                "bytes": files[1].stat().st_size,
                **measured,
                "recall@10_of_the_runs": float((scores >= exact_scores[:, -1:]).mean()),
                "gemm_spread": spread,
                "is_quiet": spread <= GEMM_SPREAD,
            }
            if spread <= GEMM_SPREAD or options.noisy:
                entry |= {
                    "queries_per_cpu_second": len(queries) / mine["cpu"],
                    "faiss_over_ours": statistics.median(ratios),
                }
            found[kind] = entry
            print(f"  {kind:8}", {key: round(value, 4) for key, value in entry.items()}, flush=True)
    return {
        "settings": {name: getattr(options, name) for name in ("documents", "dimension", "queries", "threads")},
        "kinds": found,
    }


WORKLOADS = {"exact": exact, "approximate": approximate_kinds}


def main() -> None:
    """Runs the benchmark and writes what it finds into benchmarks/results/index.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--kinds", nargs="+", choices=("ivf_sq8", "ivf_pq", "hnsw"), default=["ivf_sq8", "ivf_pq", "hnsw"]
    )
    for name, default in (("documents", 200_000), ("dimension", 384), ("queries", 512), ("k", 100), ("shards", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--noisy", action="store_true", help="give ratios on a machine that is not quiet, marked so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(lambda: opened(options.serve, options), options.threads, GEMM)
        return
    if "faiss" not in options.contenders:
        parser.error("every ratio is to faiss; name it among the contenders")
    for name in options.workloads:
        threads = "" if options.threads == 1 else f"_threads_{options.threads}"
        record(options.results, name + threads, WORKLOADS[name](options))


if __name__ == "__main__":
    main()
