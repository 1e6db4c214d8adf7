"""The stage agree: how much the reward model, and embedders, rank candidates as the LLM does (Kendall's tau).

Measured on training queries that the reward model did not learn from. The LLM scored their candidates as all others.
The embedder of an earlier round has learned from them: its figure is of what it was taught, not held out.

What the LLM was not asked about, because a rule says it, is told beside: label_separation.py.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import kendalltau

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, seed_of
from llmr_ray.config import Config
from llmr_ray.evaluation.label_separation import label_separation, untold_labels
from llmr_ray.evaluation.significance import estimate, paired_difference
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.index.vectors import pair_similarities
from llmr_ray.training.pairs import is_held_out

AGREE_VERSION = 3

REWARD_MODEL = "reward_model"
"""The judge's name beside those of embedders."""

_SCHEMA = pa.schema([("query_id", pa.string()), ("judge", pa.string()), ("tau", pa.float64())])


def agree_spec(
    config: Config, *, prepare: Artifact, rewards: Artifact, taught: Artifact, embeddings: Mapping[str, Artifact]
) -> ArtifactSpec:
    """What determines the agreement: the judges, and which queries are held out."""
    return ArtifactSpec(
        stage="agree",
        version=AGREE_VERSION,
        config={"held_out_fraction": config.reward_model.held_out_fraction},
        inputs={"prepare": prepare.id, "rewards": rewards.id, "taught": taught.id}
        | {f"embeddings_{name}": vectors.id for name, vectors in embeddings.items()},
    )


def run_agree(
    config: Config,
    artifact: Artifact,
    *,
    prepare: Artifact,
    rewards: Artifact,
    taught: Artifact,
    embeddings: Mapping[str, Artifact],
) -> None:
    """Writes the tables `agreement` (query_id, judge, tau) and `label_separation` (of label_separation.SCHEMA).

    Labels that the reward model has not learned are named in the manifest's `warnings`; and it is said there where no
    query was held out, so that no agreement can be told.

    Args:
        config: the run's.
        artifact: to be made.
        prepare: the queries.
        rewards: of the LLM.
        taught: of the reward model.
        embeddings: of each embedder that is to be compared.
    """
    started, fraction = time.monotonic(), config.reward_model.held_out_fraction
    if artifact.pending(1):
        of_llm, of_model = rewards.read("rewards"), taught.read("rewards")
        columns = ["query_id", "split_key", "dataset", "options", "gold_option"]
        judged = prepare.read("queries", columns=columns, ids=of_llm["query_id"].unique().to_pylist())
        separation = label_separation(of_model, of_llm, judged)
        ids = [query["query_id"] for query in judged.to_pylist() if is_held_out(query, fraction)]
        of_llm = of_llm.filter(pc.is_in(of_llm["query_id"], value_set=pa.array(ids, pa.string()))).drop_columns(
            "reward_source"
        )
        of_llm = of_llm.filter(pc.is_valid(of_llm["reward"]))
        judges = {REWARD_MODEL: of_model}
        judges |= {name: _similarities(of_llm, vectors) for name, vectors in embeddings.items()}
        rows = [
            {"query_id": query_id, "judge": judge, "tau": tau}
            for judge, given in judges.items()
            for query_id, tau in sorted(rank_agreement(given, of_llm).items())
        ]
        counts = Counts(rows_in=len(ids), ok=len(ids))
        tables = {"agreement": pa.Table.from_pylist(rows, schema=_SCHEMA), "label_separation": separation}
        artifact.write_shard(0, tables, counts)
    warnings = [untold_labels(artifact.part("label_separation", 0))]
    if not artifact.part("agreement", 0).num_rows:
        warnings.append(
            "nothing tells how far the reward model ranks as the LLM does: no query was held out of it, or the LLM "
            "held all candidates of those equal. It takes more training queries, or a larger share of them than "
            f"{fraction:g} (reward_model.held_out_fraction), which trains the reward model anew."
        )
    extra = {"warnings": [warning for warning in warnings if warning]}
    artifact.commit(1, seconds=time.monotonic() - started, extra=extra)


def agreement_rows(table: pa.Table, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """For each judge: mean tau, ci95, n, and `delta_vs_base` as results.json has it elsewhere, over common queries.

    Args:
        table: `agreement`.
        samples: bootstrap and randomisation samples.
        seed: of the run.
    """
    values: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        values.setdefault(row["judge"], {})[row["query_id"]] = row["tau"]
    base, rows = values.get("base", {}), []
    drawn: dict[str, Any] = {"exponential": False, "samples": samples, "seed": seed_of(seed, "agreement")}
    for judge, taus in values.items():
        figure = estimate([np.asarray(list(taus.values()))], **drawn)
        delta = None
        both = sorted(taus.keys() & base.keys())
        if judge != "base" and both:
            pair = ([np.asarray([of[name] for name in both])] for of in (taus, base))
            delta = paired_difference(*pair, **drawn).record()
        interval = [figure.low, figure.high]
        rows.append({"judge": judge, "mean": figure.mean, "ci95": interval, "n": figure.n, "delta_vs_base": delta})
    return rows


def _similarities(pairs: pa.Table, embeddings: Artifact) -> pa.Table:
    """An embedder's rewards of pairs: their similarities."""
    similarity_P = pair_similarities(embeddings, pairs["query_id"].to_pylist(), pairs["doc_id"].to_pylist())
    return pairs.set_column(pairs.schema.get_field_index("reward"), "reward", pa.array(similarity_P))


def rank_agreement(rewards: pa.Table, llm_scores: pa.Table) -> dict[str, float]:
    """Kendall's tau-b between two judges' rewards of each query's candidates: 1 the same order, -1 the opposite.

    Only documents that both judged count. A query of fewer than two such documents, or all of whose documents one
    judge holds equal, has no tau and is left out.

    Args:
        rewards: columns query_id, doc_id, reward.
        llm_scores: the other judge's; the same columns.
    """
    mine, others = (frame_of(table, [*PAIR, "reward"]) for table in (rewards, llm_scores))
    judged = mine.join(others, on=PAIR, suffix="_other", maintain_order="left")
    found = {}
    for row in judged.group_by("query_id", maintain_order=True).agg("reward", "reward_other").iter_rows(named=True):
        one, other = row["reward"], row["reward_other"]
        if len(set(one)) > 1 and len(set(other)) > 1:
            found[row["query_id"]] = float(kendalltau(one, other).statistic)
    return found
