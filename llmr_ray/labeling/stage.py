"""The stages select and label: a round of adaptive self-training around the LLM's answers (ARL2, methods.md C.4).

select: what becomes of each candidate, before the LLM is asked. label: what the LLM said, the audit, and the labels
that the round trains on. The first round has no labels to learn from: the LLM labels all candidates of as many
questions as its calls reach. Once the stop rule has been told, nothing is asked and all labels stay as they are.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts
from llmr_ray.config import Config, identity
from llmr_ray.data.splits import unit_hash
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.feedback.jobs import feedback_tasks
from llmr_ray.feedback.label_calls import num_requests
from llmr_ray.frames import PAIR, frame_of
from llmr_ray.index.vectors import pair_similarities
from llmr_ray.labeling.calibration import (
    FEWEST_QUESTIONS,
    RETRIEVER,
    Thresholds,
    calibrate,
    is_calibration,
    of_calibration,
)
from llmr_ray.labeling.calibration import with_probability as probable
from llmr_ray.labeling.rounds import (
    calibration_ndcg,
    calls_of_round,
    label_distribution,
    leads,
    next_labels,
    stop_reason,
    well_trained_questions,
)
from llmr_ray.labeling.selection import ASK, CALIBRATION, DRAWN, LEAVE, accounting, decide, settle, unchanged
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.labeling.simulation import annotate, gold_labels, label_quality
from llmr_ray.schemas import PSEUDO, conform, table_of

SELECT_VERSION = 4
LABEL_VERSION = 4
GOLD_VERSION = 2

EARLIER = "earlier"
"""Source of a pair that has a label and is no candidate of the round's retriever."""

NOT_SEEDED = "not_seeded"
"""Why the first round leaves a pair: its question is not among those that the calls reach."""

_FIRST_ROUND = ("calls_per_round", "total_calls", "calibration_fraction", "calibration_share")
_OF_ANNOTATOR = ("enabled", "annotator", "gold_missed", "gold_false_alarms", "num_canaries", "min_agreement")

LEADS = pa.schema([("query_id", pa.string()), ("lead", pa.float64()), ("round", pa.int32())])

# --- select ----------------------------------------------------------------------------------------------------------


def select_spec(
    config: Config,
    *,
    number: int,
    prepare: Artifact,
    candidates: Artifact,
    embeddings: Artifact,
    labels: Artifact | None,
) -> ArtifactSpec:
    """What determines a round's decisions: the settings, the round, the retriever, and the labels so far."""
    earlier = {} if labels is None else {"labels": labels.id}
    return ArtifactSpec(
        stage="select",
        version=SELECT_VERSION,
        config={"labeling": _settings(config, labels), "round": number, "seed": config.seed},
        inputs={"prepare": prepare.id, "candidates": candidates.id, "embeddings": embeddings.id, **earlier},
    )


def run_select(
    config: Config,
    artifact: Artifact,
    *,
    number: int,
    prepare: Artifact,
    candidates: Artifact,
    embeddings: Artifact,
    labels: Artifact | None,
) -> None:
    """Writes `candidates` (the round's, and all pairs with labels), `asked` (those the LLM is asked about), `decisions`
    and `leads` of all rounds so far. The manifest's ``extra`` has what was learned from the calibration questions.

    Args:
        config: the run's.
        artifact: to be made.
        number: of the round, from 1.
        prepare, candidates, embeddings: finished artifacts; the embeddings are those of the round's retriever.
        labels: of the round before; None in the first.

    Raises:
        ConfigError: the first round cannot label what a second one needs.
    """
    started = time.monotonic()
    gain = {} if labels is None else _gain(config, labels, embeddings)
    offered = _offered(config, prepare, candidates.read("candidates"), labels, with_pseudo=bool(gain.get("stop")))
    if labels is None:
        decisions, told = _first(config, offered)
        of_rounds = LEADS.empty_table()
    elif gain["stop"]:
        decisions, of_rounds = unchanged(offered, labels.read("labels"), number=number), labels.read("leads")
        told = {"calls": 0, "thresholds": None, **gain}
    else:
        pairs = with_cosine(offered.select(PAIR), embeddings)
        decisions, told, of_rounds = _later(config, pairs, labels, number)
        told |= gain
    # What the manifest tells is computed again where a killed run had written the tables and no more.
    if artifact.pending(1):
        is_asked = pc.equal(decisions["decision"], ASK)
        tables = {"candidates": offered, "asked": offered.filter(is_asked), "decisions": decisions, "leads": of_rounds}
        artifact.write_shard(0, tables, accounting(decisions))
    artifact.commit(1, seconds=time.monotonic() - started, extra=told)


def _settings(config: Config, labels: Artifact | None) -> dict[str, Any]:
    """What of the settings plays a part: the first round, which has no labels, is the same under every policy."""
    settings = identity(config.labeling)
    if labels is None:
        return {name: settings[name] for name in _FIRST_ROUND}
    return {name: value for name, value in settings.items() if name not in _OF_ANNOTATOR}


def _gain(config: Config, labels: Artifact, embeddings: Artifact) -> dict[str, Any]:
    """What the round's retriever gains over that of the round before, and whether something is still to be asked."""
    before = labels.require()["extra"]
    spent, settings = before["spent"], config.labeling
    ndcg = _ndcg(labels.read("labels"), embeddings, settings)
    # A rule that was told once holds: rounds that ask nothing have no new labels by which it could be taken back.
    stop = before["stop"] or stop_reason(before["ndcg"], ndcg, spent=spent, settings=settings)
    return {"spent": spent, "ndcg_before": before["ndcg"], "ndcg": ndcg, "stop": stop}


def _ndcg(labels: pa.Table, embeddings: Artifact, settings: AdaptiveConfig) -> float | None:
    """The retriever's nDCG@10 on the calibration questions as these labels have them; None where it cannot be told."""
    judged = of_calibration(labels, settings.calibration_fraction).select(PAIR).to_arrow()
    return calibration_ndcg(with_cosine(judged, embeddings), labels, settings)


def _offered(
    config: Config, prepare: Artifact, mined: pa.Table, labels: Artifact | None, *, with_pseudo: bool
) -> pa.Table:
    """The mined candidates of tasks that have feedback, and after them the pairs that were labelled before (those of
    the retriever's labels only where these stay)."""
    queries = frame_of(prepare.read("queries"), ["query_id", "task"])
    asked = queries.filter(pl.col("task").is_in(list(feedback_tasks(config))))
    offered = frame_of(mined, mined.column_names).join(asked.select("query_id"), on="query_id", how="semi")
    if labels is not None:
        known = frame_of(labels.read("labels"), [*PAIR, "source"])
        known = known.filter(pl.lit(with_pseudo) | (pl.col("source") != RETRIEVER))
        earlier = known.join(offered, on=PAIR, how="anti").select(*PAIR, source=pl.lit(EARLIER))
        offered = pl.concat([offered, earlier], how="diagonal")
    # Pairs of a query stand together, as later stages want them.
    order = offered.select("query_id").unique(maintain_order=True).with_row_index("place")
    rows = offered.join(order, on="query_id", how="left", maintain_order="left").sort("place", maintain_order=True)
    return conform(rows.drop("place").to_arrow(), "candidates")


def with_cosine(pairs: pa.Table, embeddings: Artifact) -> pa.Table:
    """Pairs with the column cosine, float32."""
    cosine_P = pair_similarities(embeddings, pairs["query_id"].to_pylist(), pairs["doc_id"].to_pylist())
    return pairs.append_column("cosine", pa.array(cosine_P))


def _first(config: Config, pairs: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """The first round: all pairs of as many questions as the calls reach, calibration questions by their share."""
    settings = config.labeling
    calls = calls_of_round(settings, 0)
    sizes = frame_of(pairs, ["query_id"]).group_by("query_id", maintain_order=True).len("pairs")
    judging: list[_Sized] = []
    others: list[_Sized] = []
    for query_id, size in sizes.iter_rows():
        of = judging if is_calibration(query_id, settings.calibration_fraction) else others
        of.append((unit_hash("question", query_id), query_id, size))
    judging, others = sorted(judging), sorted(others)
    reason_of = _within(judging, _calls_of_calibration(config, judging, others, calls), CALIBRATION)
    spent = sum(size for _, query_id, size in judging if query_id in reason_of)
    reason_of |= _within(others, calls - spent, DRAWN)
    rows = [
        {
            **pair,
            "decision": ASK if pair["query_id"] in reason_of else LEAVE,
            "reason": reason_of.get(pair["query_id"], NOT_SEEDED),
            "probability": 0.5,
            "round": 1,
        }
        for pair in pairs.select(PAIR).to_pylist()
    ]
    return table_of("decisions", rows), {"calls": calls, "spent": 0, "thresholds": None}


_Sized = tuple[float, str, int]
"""A question: a hash by which they are in order, its id, its number of pairs."""


def _calls_of_calibration(config: Config, judging: list[_Sized], others: list[_Sized], calls: int) -> int:
    """Calls of the first round for calibration questions: their share, or what a second round needs of them.

    Raises:
        ConfigError: there is a second round, and the calls do not reach what it needs.
    """
    share = round(config.labeling.calibration_share * calls)
    needed = sum(size for *_, size in judging[:FEWEST_QUESTIONS])
    at_least = needed + sum(size for *_, size in others[:1])
    if len(judging) >= FEWEST_QUESTIONS and others and at_least <= calls:
        return max(share, needed)
    if config.rounds > 1:
        raise ConfigError(
            f"a second round needs the labels of {FEWEST_QUESTIONS} calibration questions and of one that trains. Of "
            f"{len(judging)} and {len(others)} there are here the first have {at_least} pairs, and the first round may "
            f"ask about {calls}. Raise labeling.calls_per_round or total_calls, with too few calibration questions "
            "labeling.calibration_fraction, or set rounds: 1. Nothing has been asked yet."
        )
    return share


def _within(questions: list[_Sized], calls: int, reason: str) -> dict[str, str]:
    """The first questions whose pairs the calls reach, with the reason."""
    chosen = {}
    for _, query_id, size in questions:
        if size > calls:
            break
        chosen[query_id], calls = reason, calls - size
    return chosen


def _later(config: Config, pairs: pa.Table, labels: Artifact, number: int) -> tuple[pa.Table, dict[str, Any], pa.Table]:
    settings, known, before = config.labeling, labels.read("labels"), labels.require()["extra"]
    found = calibrate(pairs, known, settings)
    thresholds = found.thresholds.tightened(before["tightening"])
    own = leads(pairs, known)
    own = own.append_column("round", pa.array([number] * own.num_rows, pa.int32())).cast(LEADS)
    of_rounds = pa.concat_tables([labels.read("leads"), own])
    in_turn = [of_rounds.filter(pc.equal(of_rounds["round"], turn)) for turn in range(2, number + 1)]
    calls = calls_of_round(settings, before["spent"])
    decisions = decide(
        probable(pairs, found.calibrator),
        known,
        thresholds,
        settings,
        number=number,
        calls=calls,
        seed=config.seed,
        well_trained=well_trained_questions(in_turn, settings),
    )
    told = {
        "calls": calls,
        "thresholds": {"hi": thresholds.hi, "lo": thresholds.lo, "tightening": thresholds.tightening},
        "calibration": found.record(),
    }
    return decisions, told, of_rounds


# --- gold ------------------------------------------------------------------------------------------------------------


def gold_spec(config: Config, *, prepare: Artifact, candidates: Artifact) -> ArtifactSpec:
    """What determines the answers of an annotator of known quality."""
    settings = config.labeling
    return ArtifactSpec(
        stage="score",
        version=GOLD_VERSION,
        config={
            "annotator": "gold",
            "missed": settings.gold_missed,
            "false_alarms": settings.gold_false_alarms,
            "seed": config.seed,
            "requests": {task: [of.label_votes, of.passages_per_call] for task, of in feedback_tasks(config).items()},
        },
        inputs={"prepare": prepare.id, "candidates": candidates.id},
    )


def run_gold(config: Config, artifact: Artifact, *, prepare: Artifact, candidates: Artifact) -> None:
    """Writes llm_scores of the kind "label" for the pairs in the table `asked`: gold labels, spoiled at known rates."""
    started = time.monotonic()
    if artifact.pending(1):
        asked = candidates.read("asked")
        missed = {0.0: config.labeling.gold_missed}
        rates = {1.0: missed, 0.5: missed, 0.0: {1.0: config.labeling.gold_false_alarms}}
        said = annotate(asked, gold_labels(prepare), rates, seed=config.seed)
        unasked = {"num_prompt_tokens": 0, "num_target_tokens": 0, "truncated": False, "prompt_sha": ""}
        rows = [{**row, **unasked, "kind": "label", "scorer_id": "gold"} for row in said.to_pylist()]
        counts = Counts(rows_in=len(rows), ok=len(rows), label_requests=_requests(config, prepare, asked))
        artifact.write_shard(0, {"llm_scores": table_of("llm_scores", rows)}, counts)
    artifact.commit(1, seconds=time.monotonic() - started)


def _requests(config: Config, prepare: Artifact, asked: pa.Table) -> int:
    """In how many requests an LLM would have labelled the pairs."""
    tasks = feedback_tasks(config)
    task_of = frame_of(prepare.read("queries"), ["query_id", "task"])
    sizes = frame_of(asked, ["query_id"]).join(task_of, on="query_id").group_by("query_id", "task").len()
    return sum(num_requests(size, tasks[task]) for _, task, size in sizes.iter_rows())


# --- label -----------------------------------------------------------------------------------------------------------


def label_spec(
    config: Config,
    *,
    prepare: Artifact,
    embeddings: Artifact,
    selected: Artifact,
    llm_scores: Artifact,
    labels: Artifact | None,
) -> ArtifactSpec:
    """What determines a round's labels: its decisions, the answers, and the labels so far; and its retriever, which is
    judged by them."""
    earlier = {} if labels is None else {"labels": labels.id}
    return ArtifactSpec(
        stage="label",
        version=LABEL_VERSION,
        config={"labeling": _settings(config, labels)},
        inputs={
            "prepare": prepare.id,
            "embeddings": embeddings.id,
            "selected": selected.id,
            "llm_scores": llm_scores.id,
            **earlier,
        },
    )


def run_label(
    config: Config,
    artifact: Artifact,
    *,
    prepare: Artifact,
    embeddings: Artifact,
    selected: Artifact,
    llm_scores: Artifact,
    labels: Artifact | None,
) -> None:
    """Writes `labels` (all that hold after the round), `decisions` as settled, `rewards` (the labels that train: not
    those of calibration questions), `leads`, and of several annotators `annotations`: who said what in the rounds so
    far. The manifest's ``extra["rounds"]`` tells what each round so far has spent (calls, which are pairs, and the
    requests and LLM tokens that they took; stored answers take no tokens) and learned, and how many labels are right
    where the data has labels of its own; ``extra["ndcg"]`` how well the round's retriever orders the calibration
    questions by the labels after it, which the next one is compared with.

    Args:
        config: the run's.
        artifact: to be made.
        prepare, selected, llm_scores: finished artifacts.
        embeddings: of the round's retriever, that `selected` was made with.
        labels: of the round before; None in the first.

    Raises:
        DataError: nothing was labelled that can train.
    """
    started = time.monotonic()
    settings, told = config.labeling, selected.require()["extra"]
    decisions = selected.read("decisions")
    scores = llm_scores.read("llm_scores")
    answers = scores.filter(pc.equal(scores["kind"], "label")).select([*PAIR, "label", "evidence"])
    settled = settle(decisions, answers, _thresholds(told["thresholds"]), settings, annotator=settings.annotator)
    before = table_of("labels", []) if labels is None else labels.read("labels")
    after = before if told.get("stop") else next_labels(before, settled.new_labels)
    rewards = _rewards(after, settings.calibration_fraction)
    if not rewards.num_rows:
        raise DataError(
            "no pair has a label that may train. Raise labeling.calls_per_round, or look at the LLM's answers."
        )
    tables = {"labels": after, "decisions": settled.decisions, "rewards": rewards, "leads": selected.read("leads")}
    if llm_scores.spec.stage == "consensus":
        tables["annotations"] = _annotations(llm_scores, labels, selected.spec.config["round"])
    # A consensus asked nobody itself, and tells what its annotators took.
    manifest = llm_scores.require()
    took = manifest["counts"] | manifest["extra"]
    gold = gold_labels(prepare)
    quality = label_quality(after, gold).to_pylist() if gold.num_rows else []
    spent = told["spent"] + decisions.filter(pc.equal(decisions["decision"], ASK)).num_rows
    this_round = {
        "round": selected.spec.config["round"],
        "annotator": settings.annotator,
        "calls": spent - told["spent"],
        "spent": spent,
        "requests": took["label_requests"],
        "tokens": took["llm_tokens"],
        "pairs": decisions.num_rows,
        "audit": {name: getattr(settled.audit, name) for name in settled.audit.__dataclass_fields__},
        "distribution": label_distribution(after).to_pylist(),
        "quality": quality,
        **{name: told.get(name) for name in ("thresholds", "calibration", "ndcg_before", "ndcg", "stop")},
    }
    extra = {
        "spent": spent,
        "tightening": settled.thresholds.tightening,
        "ndcg": _ndcg(after, embeddings, settings),
        "stop": told.get("stop"),
        "rounds": [*([] if labels is None else labels.require()["extra"]["rounds"]), this_round],
    }
    if artifact.pending(1):
        artifact.write_shard(0, tables, accounting(settled.decisions))
    artifact.commit(1, seconds=time.monotonic() - started, extra=extra)


def _annotations(consensus: Artifact, labels: Artifact | None, number: int) -> pa.Table:
    """Who said what in the rounds up to this one: the table of `labels` and that of the round's consensus."""
    said = consensus.read("annotations")
    said = said.append_column("round", pa.array([number] * said.num_rows, pa.int32()))
    return said if labels is None else pa.concat_tables([labels.read("annotations"), said])


def _thresholds(told: Mapping[str, float] | None) -> Thresholds:
    """As `select` told them; without any nothing is beyond them."""
    if told is None:
        return Thresholds(hi=math.inf, lo=-math.inf)
    return Thresholds(hi=told["hi"], lo=told["lo"], tightening=told["tightening"])


def _rewards(labels: pa.Table, calibration_fraction: float) -> pa.Table:
    rows = [
        {
            **{name: row[name] for name in PAIR},
            "reward": row["label"],
            "reward_source": PSEUDO if row["source"] == RETRIEVER else "label",
            "evidence": row["evidence"],
        }
        for row in labels.to_pylist()
        if row["label"] is not None and not is_calibration(row["query_id"], calibration_fraction)
    ]
    return table_of("rewards", rows)
