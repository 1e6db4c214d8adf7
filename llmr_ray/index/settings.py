"""Settings of an index: what it proposes documents by. What it finds is always scored exactly."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """The kind of an index and its sizes. Of flat, which is exact, nothing else counts and nothing is in its id."""

    kind: str = "flat"
    """flat: every document is compared. ivf_sq8, ivf_pq: those of the nearest lists, at a byte per value or pq_bytes
    per vector. hnsw: those a walk over a graph of neighbours meets. cagra: such a graph built by a GPU (faiss with
    cuVS). The last four only propose documents, which are scored exactly from the vectors beside; mining is exact
    whatever the kind."""
    num_lists: int = 0
    """ivf: lists of the whole corpus. 0: four times the root of its documents, as FAISS advises."""
    pq_bytes: int = 0
    """ivf_pq: bytes of a code; divides the dimension. 0: a quarter of the dimension, or the next smaller divisor."""
    num_links: int = 32
    """hnsw, cagra: neighbours of a document in the graph (twice as many at the bottom)."""
    effort: int = 0
    """ivf: lists that a search looks into (nprobe); hnsw, cagra: width of the walk (efSearch). 0: the least power of
    two that reaches least_recall on sample queries, measured when the index is built."""
    refine: int = 0
    """Documents proposed for each one asked for. 0: 2, and 10 for ivf_pq."""
    least_recall: float = 0.95
    """Recall@10 against exact search, on sample queries, below which a build fails. 0: never."""
