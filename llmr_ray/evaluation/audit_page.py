"""audit.html: one self-contained page on which a person checks what the LLM rewarded.

The data are embedded as JSON that no text can break out of, and the page's script is named by its hash in the page's
content policy, so nothing else runs. It loads nothing and works from a file.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from llmr_ray.artifacts import Artifact, seed_of, sha256_text
from llmr_ray.config import Config
from llmr_ray.durable import write_atomic
from llmr_ray.evaluation import plots
from llmr_ray.evaluation.audit import Judged, Verdict, can_audit, judged, summary, verdicts
from llmr_ray.evaluation.protocols import SCENARIOS
from llmr_ray.evaluation.rendering import render

QUERY_CHARS, DOCUMENT_CHARS, TARGET_CHARS = 600, 700, 300
"""What the page shows of a text at the most."""

TITLES = {
    "llm": "LLM",
    "bm25": "BM25",
    "base": "Before training",
    "trained": "After training",
    "label": "Label",
    "reward_model": "Reward model",
}

FILTERS = {
    "against_bm25": "LLM against BM25",
    "against_base": "LLM against the embedder before training",
    "against_trained": "LLM against the embedder after training",
    "against_label": "LLM against the labels of the data",
    "against_reward_model": "LLM against the reward model",
    "answer_absent": "No desired output in the LLM's best candidates",
    "top_longer": "The LLM's best are much longer",
    "top_shorter": "The LLM's best are much shorter",
    "injection": "A text that talks to the judge",
}


def write_audit(run_dir: Path, config: Config, artifacts: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Writes ``audit.html`` into the run's folder.

    Args:
        run_dir: the run's folder.
        config: of the run; `report.audit_queries` 0 writes nothing.
        artifacts: as `report.write_report` has them.

    Returns:
        The figures over all queries (`audit.summary`), with `shown` and `left_out`, the numbers of queries on the page
        and of those that were sampled but would have made it too large. None where there is nothing to audit, or it is
        switched off.
    """
    if not config.report.audit_queries or not can_audit(artifacts):
        return None
    audited = judged(config, artifacts)
    found = verdicts(audited)
    samples = config.evaluate.bootstrap_samples
    figures = summary(audited, found, samples=samples, seed=seed_of(config.seed, "audit"))
    entries, left_out = _entries(config, audited, found)
    figures |= {"shown": len(entries), "left_out": left_out}
    write_atomic(run_dir / "audit.html", _html(config.name, audited, figures, entries).encode())
    return figures


def sampled(task_of: Mapping[str, str], number: int) -> list[str]:
    """Query ids, in equal shares of the tasks as far as these reach, each task's by a hash of the id."""
    queues: dict[str, list[str]] = {}
    for query_id in sorted(task_of, key=sha256_text):
        queues.setdefault(task_of[query_id], []).append(query_id)
    turns = sorted(
        (place, task, query_id) for task, members in queues.items() for place, query_id in enumerate(members[:number])
    )
    return [query_id for _, _, query_id in turns[:number]]


def safe_json(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or begin markup."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Outside of its strings JSON has none of these, and inside them an escape says the same.
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # A lone surrogate cannot be written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode()


def _entries(config: Config, audited: Judged, found: Mapping[str, Verdict]) -> tuple[list[dict[str, Any]], int]:
    """What the page shows in full, and how many sampled queries had no room."""
    chosen = sampled({name: query["task"] for name, query in audited.queries.items()}, config.report.audit_queries)
    rows = audited.pairs.filter(pl.col("query_id").is_in(chosen))
    members = {str(name): group for (name,), group in rows.group_by(["query_id"], maintain_order=True)}
    entries: list[dict[str, Any]] = []
    room = config.report.audit_megabytes * 2**20
    for query_id in chosen:
        entry = _entry(audited, query_id, members[query_id], found[query_id])
        room -= len(safe_json(entry).encode()) + 1
        if room < 0:
            break
        entries.append(entry)
    return entries, len(chosen) - len(entries)


def _entry(audited: Judged, query_id: str, members: pl.DataFrame, verdict: Verdict) -> dict[str, Any]:
    query = audited.queries[query_id]
    return {
        "id": query_id,
        "task": query["task"],
        "dataset": query["dataset"],
        "query": _cut(query["query"], QUERY_CHARS),
        "targets": [_cut(target, TARGET_CHARS) for target in query["targets"][:3]],
        "flags": [name for name, holds in verdict.flags.items() if holds],
        "tau": {name: round(tau, 3) for name, tau in verdict.taus.items() if math.isfinite(tau)},
        "candidates": [
            {
                "id": row["doc_id"],
                "source": row["source"],
                "chars": row["num_chars"],
                "text": _cut(audited.documents[row["doc_id"]], DOCUMENT_CHARS),
                "rule": row["rule"],
                "suspicious": row["suspicious"],
                "values": {
                    name: _rounded(row["relevance" if name == "label" else name]) for name in ("llm", *audited.rankings)
                },
            }
            for row in members.iter_rows(named=True)
        ],
    }


def _html(name: str, audited: Judged, figures: Mapping[str, Any], entries: list[dict[str, Any]]) -> str:
    script = (Path(__file__).with_name("templates") / "audit.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rankings = ["llm", *audited.rankings]
    data = {
        "rankings": [[ranking, TITLES[ranking]] for ranking in rankings],
        "filters": FILTERS,
        "queries": entries,
    }
    taus = [
        (f"{row['task']}: {TITLES[row['ranking']]}", row["tau"]["mean"], *row["tau"]["ci95"])
        for row in figures["agreement"]
        if row["tau"]
    ]
    gains = [(f"{row['task']}: {TITLES[row['ranking']]}", row["mean"], *row["ci95"]) for row in figures["gains"]]
    return render(
        "audit.html.j2",
        name=name,
        figures=figures,
        titles=TITLES,
        filters=FILTERS,
        scenarios=SCENARIOS,
        # Our own drawings; of the data they hold only names of tasks, which the configuration checks.
        plot=Markup(plots.intervals(taus, "Kendall's tau-b with the LLM")) if taus else None,
        gains_plot=Markup(plots.intervals(gains, "feedback on the first choice, less a random one's"))
        if gains
        else None,
        data=Markup(safe_json(data)),
        script=Markup(script),
        digest=digest,
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "…"


def _rounded(value: float | None) -> float | None:
    """Five digits are enough for a page; -inf (a rule's) is told by the rule's name."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
