"""TREC runs and qrels, from which other tools (trec_eval, ir_measures, ranx) reach the same figures."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from llmr_ray.durable import write_atomic
from llmr_ray.evaluation.metrics import trec_scores


def write_trec(folder: Path, run: pa.Table, qrels: pa.Table, datasets: Mapping[str, str]) -> list[Path]:
    """Writes ``{dataset}.{method}.run.trec`` and ``{dataset}.qrels.trec`` for each data set with labels.

    White space in ids, which the format cannot hold, is percent-encoded. Scores are made strictly decreasing, because
    readers of the format sort by score and break ties by document id.

    Args:
        folder: where the files go.
        run: the `run` table; its run_name is the retrieval method.
        qrels: the `qrels` table; labels of queries outside the run are left out.
        datasets: query id -> data set, of the evaluated queries.

    Returns:
        The files written, sorted.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    labelled = set()
    for label in qrels.to_pylist():
        dataset = datasets.get(label["query_id"])
        if dataset is not None:
            labelled.add(dataset)
            pair = f"{_word(label['query_id'])} 0 {_word(label['doc_id'])} {label['relevance']}"
            lines[f"{dataset}.qrels.trec"].append(pair)
    rankings: dict[tuple[str, str], list[tuple[int, str, float]]] = defaultdict(list)
    for row in run.to_pylist():
        rankings[row["run_name"], row["query_id"]].append((row["rank"], row["doc_id"], row["score"]))
    for (method, query_id), ranking in rankings.items():
        dataset = datasets[query_id]
        if dataset not in labelled:
            continue
        ranking.sort()
        for (rank, doc_id, _), score in zip(ranking, trec_scores([score for *_, score in ranking]), strict=True):
            lines[f"{dataset}.{method}.run.trec"].append(
                f"{_word(query_id)} Q0 {_word(doc_id)} {rank} {float(score):.9g} {method}"
            )
    for name, content in lines.items():
        write_atomic(folder / name, ("\n".join(content) + "\n").encode())
    return sorted(folder / name for name in lines)


def _word(identifier: str) -> str:
    return re.sub(r"\s", lambda match: f"%{ord(match.group()):02X}", identifier)
