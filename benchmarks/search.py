"""Exact search: our shards against one faiss.IndexFlatIP, and ways to search thousands of tiny ranges.

    python benchmarks/search.py [--documents 100000] [--queries 512] [--shards 4] [--rounds 5]

One process, one thread, contenders interleaved, CPU seconds; the figure is the median of the rounds' ratios. A gate
runs first: the shards' ids must equal the oracle's (on a sample), and FAISS's except where it breaks ties or rounds
differently; a failed gate voids the ratio. In-run sgemm says what the machine could do.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import faiss
import numpy as np

from llmr_ray.artifacts import sha256_file
from llmr_ray.index import shards
from llmr_ray.index.topk import exact_topk, merge_topk
from llmr_ray.mining.bm25 import BM25


def unit(rng: np.random.Generator, rows: int, dimension: int) -> np.ndarray:
    """Random rows of unit norm."""
    vectors = rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def build(folder: Path, docs: np.ndarray, num_shards: int) -> list[shards.Shard]:
    """Writes and opens the shards of a corpus."""
    opened = []
    for number, (start, end) in enumerate(pairwise(len(docs) * cut // num_shards for cut in range(num_shards + 1))):
        path = folder / shards.file_name(number)
        shards.write_shard(docs[start:end], path)
        opened.append(shards.Shard(path, start, sha256_file(path)))
    return opened


def whole_corpus(options: argparse.Namespace, rng: np.random.Generator, folder: Path) -> None:
    """Every query searches every document."""
    docs, queries = unit(rng, options.documents, options.dimension), unit(rng, options.queries, options.dimension)
    scopes = np.tile([[0, options.documents]], (options.queries, 1))
    flat = faiss.IndexFlatIP(options.dimension)
    flat.add(docs)
    opened = build(folder, docs, options.shards)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        return merge_topk([shard.search(queries, scopes, options.k) for shard in opened], options.k)

    sample = slice(0, 8)
    mine, oracle = ours(), exact_topk(queries[sample], docs, scopes[sample], options.k)
    if not (np.array_equal(mine[0][sample], oracle[0]) and np.array_equal(mine[1][sample], oracle[1])):
        raise SystemExit("gate failed: the shards' result is not the oracle's")
    faiss_scores, faiss_rows = flat.search(queries, options.k)
    agreement = float((mine[0] == faiss_rows).mean())
    if np.abs(faiss_scores - mine[1]).max() > 1e-5 or agreement < 0.99:
        raise SystemExit(f"gate failed: only {agreement:.4f} of FAISS's ids are ours")

    parts = [shard.search(queries, scopes, options.k) for shard in opened]
    ratios, ours_s, faiss_s, gemm_s, merge_s = [], [], [], [], []
    for _ in range(options.rounds):
        ours_s.append(seconds(ours))
        faiss_s.append(seconds(lambda: flat.search(queries, options.k)))
        gemm_s.append(seconds(lambda: queries @ docs.T))
        merge_s.append(seconds(lambda: merge_topk(parts, options.k)))
        ratios.append(faiss_s[-1] / ours_s[-1])
    low, high = np.percentile(ratios, [25, 75])
    print(
        f"{options.documents} x {options.dimension}, {options.queries} queries, k={options.k}, {options.shards} shards"
    )
    print(f"  ours {median(ours_s):.3f} s, one IndexFlatIP {median(faiss_s):.3f} s, sgemm alone {median(gemm_s):.3f} s")
    print(f"  faiss / ours = {median(ratios):.2f} (quartiles {low:.2f} to {high:.2f}); ids equal: {agreement:.5f}")
    print(f"  merging shards: {median(merge_s) / median(ours_s):.1%} of our time")


def tiny_ranges(options: argparse.Namespace, rng: np.random.Generator, folder: Path) -> None:
    """Every query has a range of its own, as in dialogues and long texts."""
    number, rows = 1000, 50_000
    docs, queries = unit(rng, rows, options.dimension), unit(rng, number, options.dimension)
    starts = rng.integers(0, rows - 250, number)
    scopes = np.stack([starts, starts + rng.integers(10, 251, number)], axis=1)
    flat = faiss.IndexFlatIP(options.dimension)
    flat.add(docs)
    (shard,) = build(folder, docs, 1)

    def selectors() -> None:
        for query, (start, end) in zip(queries, scopes.tolist(), strict=True):
            chosen = faiss.SearchParameters(sel=faiss.IDSelectorRange(start, end))  # type: ignore[call-arg]
            flat.search(query[None], options.k, params=chosen)

    def slices() -> None:
        for query, (start, end) in zip(queries, scopes.tolist(), strict=True):
            faiss.knn(query[None], docs[start:end], options.k, metric=faiss.METRIC_INNER_PRODUCT)

    timed = {"ours (exact order)": lambda: shard.search(queries, scopes, options.k), "IDSelectorRange": selectors}
    timed["faiss.knn on slices"] = slices
    taken = {name: median(seconds(run) for _ in range(options.rounds)) for name, run in timed.items()}
    print(f"{number} ranges of 10 to 250 rows: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in taken.items()))

    words = [f"word{word}" for word in range(2000)]
    weights = 1 / np.arange(1, 2001)
    texts = [" ".join(rng.choice(words, 40, p=weights / weights.sum())) for _ in range(5000)]
    starts = rng.integers(0, 4750, number)
    scopes = np.stack([starts, starts + rng.integers(10, 251, number)], axis=1)
    build_s = seconds(lambda: BM25(texts, 0.82, 0.68))
    bm25 = BM25(texts, 0.82, 0.68)
    each = seconds(lambda: bm25.topk(texts[:number], scopes, options.k))
    shared = np.tile([[0, 5000]], (number, 1))
    pool = seconds(lambda: bm25.topk(texts[:number], shared, options.k))
    print(f"BM25, 5000 documents: tokenizing {build_s:.2f} s, 1000 queries of one range each {each:.2f} s, ", end="")
    print(f"1000 queries of one shared range {pool:.2f} s")


def main() -> None:
    """Parses the options and runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("documents", 100_000), ("dimension", 384), ("queries", 512), ("k", 100), ("shards", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shards.set_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        whole_corpus(options, rng, Path(folder))
        tiny_ranges(options, rng, Path(folder))


if __name__ == "__main__":
    main()
