"""The stage consensus: what several LLMs that labelled the same pairs hold together (methods.md C.1).

Its table llm_scores takes the place of a single LLM's; who said what is kept beside it.
"""

import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config
from llmr_ray.errors import DataError
from llmr_ray.evaluation.annotators import consensus
from llmr_ray.schemas import table_of

CONSENSUS_VERSION = 1

NO_CONSENSUS = "the annotators agree too little"

ANNOTATIONS = pa.schema(
    [("query_id", pa.string()), ("doc_id", pa.string()), ("annotator", pa.string()), ("label", pa.float32())]
)
"""One row for each annotator and pair; label is null where the annotator gave none."""

_Row = dict[str, Any]


def consensus_spec(config: Config, llm_scores: Mapping[str, Artifact]) -> ArtifactSpec:
    """What determines the consensus: the labels, and how many annotators must agree."""
    return ArtifactSpec(
        stage="consensus",
        version=CONSENSUS_VERSION,
        config={"min_agreement": config.labeling.min_agreement},
        inputs={f"llm_scores_{name}": scores.id for name, scores in llm_scores.items()},
    )


def run_consensus(config: Config, artifact: Artifact, llm_scores: Mapping[str, Artifact]) -> None:
    """Writes `llm_scores` of the kind label, one row a pair, and `annotations`. rows_in counts pairs. The manifest's
    ``extra`` has what all annotators took.

    Args:
        config: the run's.
        artifact: to be made.
        llm_scores: of each annotator, about the same candidates.
    """
    started = time.monotonic()
    scorer = "consensus of " + ", ".join(scores.require()["extra"]["scorer_id"] for scores in llm_scores.values())
    num_shards = next(iter(llm_scores.values())).require()["num_shards"]
    for shard in artifact.pending(num_shards):
        said = {name: _by_pair(scores.read("llm_scores", shard)) for name, scores in llm_scores.items()}
        pairs = list(dict.fromkeys(pair for of_annotator in said.values() for pair in of_annotator))
        rows, annotations, counts = [], [], Counts(rows_in=len(pairs))
        for pair in pairs:
            if lacking := [name for name, of_annotator in said.items() if pair not in of_annotator]:
                raise DataError(f"the annotators {lacking} were not asked about {pair}: their candidates differ.")
            own = {name: of_annotator[pair] for name, of_annotator in said.items()}
            row = together(own, config.labeling.min_agreement) | {"scorer_id": scorer}
            if row.get("error"):
                counts.quarantined[row["error"]] += 1
            else:
                counts.ok += 1
            rows.append(row)
            named = dict(zip(("query_id", "doc_id"), pair, strict=True))
            annotations += [named | {"annotator": name, "label": row["label"]} for name, row in own.items()]
        tables = {
            "llm_scores": table_of("llm_scores", rows),
            "annotations": pa.Table.from_pylist(annotations, ANNOTATIONS),
        }
        artifact.write_shard(shard, tables, counts)
    paid = [scores.require()["counts"] for scores in llm_scores.values()]
    took = {name: sum(counts[name] for counts in paid) for name in ("label_requests", "llm_tokens")}
    artifact.commit(num_shards, seconds=time.monotonic() - started, extra={"scorer_id": scorer, **took})


def together(said: Mapping[str, _Row], min_agreement: float) -> _Row:
    """The llm_scores row of a pair: the label with most annotators behind it, with the evidence and flags of the first
    of them; an error where too few agree, and the first one's own where nobody gave a label.

    Args:
        said: llm_scores rows of the pair by annotator; those with an error have no vote.
        min_agreement: share of the votes that the label must have.
    """
    labels = {name: row["label"] for name, row in said.items() if row["label"] is not None}
    first = next(iter(said.values()))
    if not labels:
        return first
    agreed = consensus(labels, min_agreement=min_agreement).label
    if agreed is None:
        return first | {"label": None, "evidence": None, "flags": None, "error": NO_CONSENSUS}
    return next(said[name] for name, label in labels.items() if label == agreed)


def _by_pair(scores: pa.Table) -> dict[tuple[str, str], _Row]:
    return {(row["query_id"], row["doc_id"]): row for row in scores.to_pylist()}
