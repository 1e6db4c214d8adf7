"""Encoding a corpus against sentence-transformers' `encode`, and what each precision costs in retrieval.

    python benchmarks/encoding.py                                  # lengths, then quality
    python benchmarks/encoding.py --workloads mixed --rounds 3

mixed and equal: texts of random words, lognormal lengths or all of one length. `st_N` is sentence-transformers
with batches of N texts, in float32 as it comes; of these the fastest is the peer. Ours are `float32`, `bfloat16` and
`int8`. Every contender's embeddings are held against a peer's: a cosine below its gate voids the ratio. Ratios are the
peer's CPU seconds over ours, tokenising included, so 2 is twice as fast. Contenders are processes of their own that
take turns; a ratio is the median over rounds. A float32 matrix product is timed before and after each turn: where that
varies by more than 15% the machine was not quiet, and no ratio is given unless --noisy asks for it.

quality: nDCG@10 of HotpotQA's development questions over their own paragraphs, for each precision.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contender import Contender, gemm_spread, record, serve, spent, take_turns
from training_workloads import make_examples

RESULTS = Path(__file__).parent / "results" / "encoding.json"
GEMM_SPREAD = 0.15
GEMM = (1024, 384, 1536)
MODEL, MAX_TOKENS, BATCH_TOKENS = "minilm-l6", 256, 4096
PEERS = tuple(f"st_{size}" for size in (8, 16, 32, 64))
OURS = {"float32": 0.9999, "bfloat16": 0.999, "int8": 0.98}
"""The least cosine that each must have to the peer's embedding of the same text."""
CONTENDERS = (*PEERS, *OURS)


def texts_of(workload: str, number: int, model: str) -> list[str]:
    """Random words that are one token each."""
    examples = make_examples(f"{workload}_contrastive", -(-number // 8), model)
    return [text for example in examples for text in (example["query"], *example["docs"])][:number]


def encoder(name: str, model: str) -> Callable[[list[str]], np.ndarray]:
    """Embeds texts as a contender does."""
    if name in PEERS:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(model, device="cpu")
        peer.max_seq_length = MAX_TOKENS
        size = int(name.removeprefix("st_"))
        return lambda texts: peer.encode(
            texts, batch_size=size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
    from llmr_ray.modeling.embedder import Embedder

    ours = Embedder(model, max_query_tokens=MAX_TOKENS, max_document_tokens=MAX_TOKENS, precision=name, device="cpu")
    return lambda texts: ours.encode(texts, instruction="", max_tokens=MAX_TOKENS, batch_tokens=BATCH_TOKENS)


def opened(options: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """What does a job of a contender: encodes the texts and says what that cost; with `told`, the vectors as well."""
    encode = encoder(options.serve, options.model)
    texts = texts_of(options.workload, options.texts, options.model)
    encode(texts[:64])

    def work(job: dict[str, Any]) -> dict[str, Any]:
        with spent() as cost:
            vectors = encode(texts)
        return {**cost, "vectors": vectors.tolist()} if job["told"] else {**cost}

    return work


def speed(workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of the contenders on texts of some lengths."""
    print(f"{workload}: {options.texts} texts", flush=True)
    with contextlib.ExitStack() as stack:
        arguments = (f"--workload={workload}", f"--texts={options.texts}", f"--model={options.model}")
        running = {}
        for name in options.contenders:
            running[name] = Contender(__file__, name, options.threads, *arguments)
            stack.callback(running[name].close)
        vectors = {name: np.asarray(contender.ask({"told": True})["vectors"]) for name, contender in running.items()}
        peer = next(name for name in running if name in PEERS)
        cosines = {name: float((found * vectors[peer]).sum(axis=1).min()) for name, found in vectors.items()}
        runs = take_turns(running, options.rounds, {"told": False})
    return figures(runs, cosines, options)


def figures(runs: dict[str, list[dict[str, Any]]], cosines: dict[str, float], options: argparse.Namespace) -> Any:
    """Medians and ratios to the fastest peer, printed and returned."""
    product, spread = gemm_spread([run for own in runs.values() for run in own])
    is_quiet = spread <= GEMM_SPREAD
    cpu = {name: statistics.median(run["cpu"] for run in own) for name, own in runs.items()}
    peer = min((name for name in runs if name in PEERS), key=lambda name: cpu[name])
    found: dict[str, Any] = {}
    for name, own in runs.items():
        entry: dict[str, Any] = {
            "texts_per_cpu_second": options.texts / cpu[name],
            "peak_mb": statistics.median(run["peak_mb"] for run in own),
            "least_cosine": cosines[name],
        }
        if name in OURS and cosines[name] < OURS[name]:
            entry["gate"] = f"a cosine of {cosines[name]:.4f}, and {OURS[name]} is needed"
        elif name in OURS and (is_quiet or options.noisy):
            entry["ratios"] = [theirs["cpu"] / mine["cpu"] for theirs, mine in zip(runs[peer], own, strict=True)]
            entry["peer_over_ours"] = statistics.median(entry["ratios"])
        found[name] = entry
        shown = ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if isinstance(value, float))
        print(f"  {name:9} {shown}{'; GATE FAILED: ' + entry['gate'] if 'gate' in entry else ''}")
    print(f"  peer {peer}; products {product:.0f} GFLOP/s, spread {spread:.0%}{'' if is_quiet else ': not quiet'}")
    return {
        "settings": {"texts": options.texts, "threads": options.threads, "batch_tokens": BATCH_TOKENS},
        "peer": peer,
        "gemm_gflops": product,
        "gemm_spread": spread,
        "is_quiet": is_quiet,
        "contenders": found,
    }


def quality(options: argparse.Namespace) -> dict[str, Any]:
    """nDCG@10 of real questions in each precision, and its difference to float32 with a paired interval."""
    from llmr_ray import assets
    from llmr_ray.data.records import read_json
    from llmr_ray.evaluation.metrics import retrieval_values
    from llmr_ray.evaluation.significance import paired_difference

    rows = read_json(assets.resolve("hotpotqa").path)[: options.questions]
    corpus = {title: f"{title}. {''.join(sentences)}" for row in rows for title, sentences in row["context"]}
    titles = list(corpus)
    judged = {row["_id"]: {title: 1 for title, _ in row["supporting_facts"] if title in corpus} for row in rows}
    ndcg: dict[str, np.ndarray] = {}
    for name in OURS:
        encode = encoder(name, options.model)
        scores_QD = encode([row["question"] for row in rows]) @ encode(list(corpus.values())).T
        best_QK = np.argsort(-scores_QD, axis=1, kind="stable")[:, :10]
        rankings = {
            row["_id"]: [(titles[number], float(scores[number])) for number in best]
            for row, scores, best in zip(rows, scores_QD, best_QK, strict=True)
        }
        values = retrieval_values(judged, rankings, ["nDCG@10"])["nDCG@10"]
        ndcg[name] = np.asarray([values[row["_id"]] for row in rows])
    found: dict[str, Any] = {}
    for name, values_Q in ndcg.items():
        lost = paired_difference([values_Q], [ndcg["float32"]], exponential=False, samples=10_000, seed=0)
        found[name] = {"nDCG@10": float(values_Q.mean()), "minus_float32": lost.mean, "ci95": [lost.low, lost.high]}
        print(f"  {name:9} {found[name]}", flush=True)
    return {"questions": len(rows), "documents": len(corpus), "precisions": found}


WORKLOADS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "mixed": lambda options: speed("mixed", options),
    "equal": lambda options: speed("equal", options),
    "quality": quality,
}


def main() -> None:
    """Runs the benchmark and writes what it finds into benchmarks/results/encoding.json."""
    from llmr_ray import assets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="", help="a folder; empty: the sample embedder")
    parser.add_argument("--noisy", action="store_true", help="give ratios on a machine that is not quiet, marked so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or str(assets.resolve(MODEL).path)
    if options.serve:
        serve(lambda: opened(options), options.threads, GEMM)
        return
    if not set(PEERS) & set(options.contenders):
        parser.error(f"every ratio is to sentence-transformers; name one of {', '.join(PEERS)} among the contenders")
    for name in options.workloads:
        threads = "" if options.threads == 1 else f"_threads_{options.threads}"
        record(options.results, name + threads, WORKLOADS[name](options))


if __name__ == "__main__":
    main()
