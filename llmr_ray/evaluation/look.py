"""An early look: how well checkpoints retrieve for development queries, while training goes on.

Whoever trains for days wants to know after an hour. Each new checkpoint is measured in a process of its own, so that no
training step waits; a checkpoint that comes while another is measured is passed over. Which ones are measured thus
depends on speed, and what is found is shown but is no part of any artifact.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, canonical_json
from llmr_ray.config import Config
from llmr_ray.data.scope import scopes
from llmr_ray.data.splits import lowest, unit_hash
from llmr_ray.data.text import document_texts
from llmr_ray.durable import write_atomic
from llmr_ray.evaluation.metrics import relevance_by_query, retrieval_values
from llmr_ray.modeling.encoding import Encode, text_encoder
from llmr_ray.ticking import ticking
from llmr_ray.training import checkpoint

log = logging.getLogger(__name__)

MEASURE = "nDCG@10"
DEPTH = 10

POOL_DOCUMENTS = 2000
"""Documents that a data set's queries are searched in, beside the gold ones: a look must cost seconds."""

POLL_SECONDS = 2.0

LOOKS_FILE = "looks.json"

Measured = dict[str, float]
"""The mean measure by data set."""

Look = Callable[[Path], Future[Measured]]
"""Starts measuring the model in a folder."""


@dataclass(frozen=True, kw_only=True)
class LookSet:
    """The development queries of a data set and what they are searched in.

    task: says which instructions go before texts. ranges: int64 [Q, 2], which of the documents each query may find.
    qrels: by query id. Documents are named by their number.
    """

    dataset: str
    task: str
    query_ids: list[str]
    queries: list[str]
    documents: list[str]
    ranges: np.ndarray
    qrels: dict[str, dict[str, int]]


def look_sets(prepare: Artifact, num_queries: int) -> list[LookSet]:
    """A set for each data set that has development queries with labelled documents.

    Args:
        prepare: of the run; only documents that are searched are held.
        num_queries: of a data set at the most; the lowest by a hash of their ids.
    """
    queries, qrels = prepare.read("queries"), prepare.read("qrels")
    places = prepare.read("corpus", columns=["doc_id", "pool", "position"])
    relevant = relevance_by_query(qrels.filter(pc.greater(qrels["relevance"], 0)))
    dev = queries.filter(pc.equal(queries["split"], "dev"))
    dev = dev.filter(pc.is_in(dev["query_id"], value_set=pa.array(list(relevant), pa.string())))
    made = []
    for dataset in sorted(set(dev["dataset"].to_pylist())):
        of = dev.filter(pc.equal(dev["dataset"], dataset))
        chosen = lowest(dataset, of["query_id"].to_pylist(), num_queries)
        of = of.filter(pc.is_in(of["query_id"], value_set=pa.array(sorted(chosen))))
        of_set = {name: relevant[name] for name in of["query_id"].to_pylist()}
        made.append(_look_set(dataset, of, prepare, places, of_set))
    return made


def _look_set(
    dataset: str, queries: pa.Table, prepare: Artifact, places: pa.Table, relevant: dict[str, dict[str, int]]
) -> LookSet:
    ranges = scopes(queries, places)
    reach = np.unique(np.concatenate([np.arange(start, end) for start, end in np.unique(ranges, axis=0)]))
    named = dict.fromkeys(doc_id for documents in relevant.values() for doc_id in documents)
    gold = np.flatnonzero(pc.is_in(places["doc_id"], value_set=pa.array(list(named), pa.string())).to_numpy())
    doc_ids = places["doc_id"].take(pa.array(reach)).to_pylist()
    drawn = np.argsort([unit_hash("look", dataset, doc_id) for doc_id in doc_ids], kind="stable")[:POOL_DOCUMENTS]
    rows = np.union1d(reach[drawn], gold)
    found = prepare.read(
        "corpus", columns=["doc_id", "title", "text"], ids=places["doc_id"].take(pa.array(rows)).to_pylist()
    )
    number_of = {doc_id: str(number) for number, doc_id in enumerate(found["doc_id"].to_pylist())}
    return LookSet(
        dataset=dataset,
        task=queries["task"][0].as_py(),
        query_ids=queries["query_id"].to_pylist(),
        queries=queries["query"].to_pylist(),
        documents=document_texts(found),
        ranges=np.searchsorted(rows, ranges),
        qrels={
            query_id: {number_of[doc_id]: grade for doc_id, grade in documents.items() if doc_id in number_of}
            for query_id, documents in relevant.items()
        },
    )


def measure_model(model: str, sets: Sequence[LookSet], config: Config) -> Measured:
    """`measure` with the embedder in a folder: what another process is given to do."""
    return measure(sets, text_encoder(model, config))


def measure(sets: Sequence[LookSet], encode: Encode) -> Measured:
    """The mean nDCG@10 of each set.

    Args:
        sets: what is searched.
        encode: (texts, task, "query" or "document") -> float32 [n, D].
    """
    means = {}
    for of in sets:
        sim_QN = encode(of.queries, of.task, "query") @ encode(of.documents, of.task, "document").T
        number_N = np.arange(len(of.documents))
        sim_QN[(number_N < of.ranges[:, :1]) | (number_N >= of.ranges[:, 1:])] = -np.inf
        rankings = {}
        for query_id, sim_N in zip(of.query_ids, sim_QN, strict=True):
            best = np.argsort(-sim_N, kind="stable")[:DEPTH]
            rankings[query_id] = [(str(row), float(sim_N[row])) for row in best if np.isfinite(sim_N[row])]
        values = retrieval_values(of.qrels, rankings, [MEASURE])[MEASURE]
        means[of.dataset] = float(np.mean(list(values.values())))
    return means


@contextmanager
def early_look(look: Look | None, root: Path, *, base: Path, folder: Path, artifact_id: str) -> Iterator[None]:
    """Measures the base model, then newest checkpoints, while the block runs, and at its end the last one.

    What is found is printed, and kept in ``looks.json`` in `folder`, where the report finds it.

    Args:
        look: starts measuring a model; None: nothing is looked at.
        root: where the checkpoints are.
        base: the model before the first step.
        folder: of the run.
        artifact_id: of the training; looks of another one are forgotten.
    """
    if look is None:
        yield
        return
    seen = {found["step"]: found["values"] for found in read_looks(folder, artifact_id)}
    tried = set(seen)  # one that failed once would fail again
    running: list[tuple[int, Future[Measured]]] = []

    def collect() -> None:
        step, future = running.pop()
        try:
            seen[step] = future.result()
        except Exception as error:  # whatever it is, training is not to suffer; a checkpoint may just be gone
            log.warning("the early look at step %d failed: %s", step, str(error).splitlines()[-1:])
            return
        record = {"artifact": artifact_id, "looks": [{"step": at, "values": seen[at]} for at in sorted(seen)]}
        write_atomic(folder / LOOKS_FILE, (canonical_json(record) + "\n").encode())
        means = ", ".join(f"{dataset} {mean:.3f}" for dataset, mean in seen[step].items())
        print(f"early look, step {step}: {MEASURE} on development queries: {means}", file=sys.stderr, flush=True)

    def start() -> None:
        step, model = (0, base) if 0 not in tried else checkpoint.last_saved(root) or (0, base)
        if step not in tried:
            tried.add(step)
            running.append((step, look(model)))

    def tick() -> None:
        if running and running[0][1].done():
            collect()
        if not running:
            start()

    with ticking(tick, POLL_SECONDS, "early-look"):
        yield
    if running:
        collect()
    start()
    if running:
        collect()


def read_looks(folder: Path, artifact_id: str) -> list[dict[str, Any]]:
    """What was found for a training: ``step`` and ``values`` (mean by data set) of each look, in order of steps."""
    try:
        record: Mapping[str, Any] = json.loads((folder / LOOKS_FILE).read_text())
    except FileNotFoundError:
        return []
    return list(record["looks"]) if record["artifact"] == artifact_id else []
