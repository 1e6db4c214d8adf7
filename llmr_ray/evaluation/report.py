"""The report of a run: results.json, self-contained report.html and audit.html, TREC files and the trained embedder."""

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from llmr_ray.artifacts import Artifact
from llmr_ray.config import LLM, Config
from llmr_ray.data.splits import SPLITS_TOLD
from llmr_ray.durable import staged, write_atomic
from llmr_ray.evaluation import plots, reading
from llmr_ray.evaluation.agreement import REWARD_MODEL, agreement_rows
from llmr_ray.evaluation.annotators import compared, fooled_rates, stage_of
from llmr_ray.evaluation.audit_page import write_audit
from llmr_ray.evaluation.label_separation import separation_rows
from llmr_ray.evaluation.leakage import KINDS, leakage_figures
from llmr_ray.evaluation.look import MEASURE, read_looks
from llmr_ray.evaluation.published import beside_published
from llmr_ray.evaluation.rendering import render
from llmr_ray.evaluation.results import held_out_tasks, result_rows, stage_warnings
from llmr_ray.evaluation.showcase import test_examples, training_examples
from llmr_ray.evaluation.shown import shown_figures
from llmr_ray.evaluation.tables import effect, in_order, method_name, p_text, result_of, tables
from llmr_ray.evaluation.trec import write_trec
from llmr_ray.loading import to_yaml


def write_report(
    *,
    run_dir: Path,
    config: Config,
    artifacts: dict[str, Artifact],
    stages: list[dict[str, Any]],
    command: str,
    commit: str,
) -> dict[str, Any]:
    """Writes ``results.json``, ``report.html``, ``audit.html``, ``trec/`` and ``embedder/`` into the run's folder.

    Args:
        run_dir: the run's folder.
        config: of the run.
        artifacts: finished ones; "prepare" and "evaluate" are needed, "candidates", "llm_scores", "rewards" and
            "agreement", "canaries", "labels", "generate", "leakage" and "checkpoint" are shown where they exist, and
            for the audit "embed_base", "embed_trained" and "teach".
        stages: for each stage its name (`stage`), `artifact` id, `seconds`, the fields of artifacts.Counts and, where
            there are any, `warnings`.
        command: repeats the run.
        commit: of the code.

    Returns:
        What results.json holds: rows, stages, command, commit, seed, shown (what the prompts hold), reading where
        the LLM does not simply read all passages, agreement where there is a reward model, annotators (of all rounds,
        and of the `first_round` where there are later ones) and canaries where LLMs label, labeling where labels are
        made in rounds, questions where the LLM wrote some, leakage where it was looked for, published where
        report.reproduces names tables, and audit where the LLM gave feedback.

    Raises:
        DataError: an artifact that is needed is not finished.
    """
    prepare, evaluate = artifacts["prepare"], artifacts["evaluate"]
    tasks = {name: dataset.task for name, dataset in config.datasets.items()}
    rows = result_rows(
        evaluate.read("metrics"),
        tasks,
        config.evaluate.methods,
        samples=config.evaluate.bootstrap_samples,
        seed=config.seed,
        artifacts={method: _rests_on(evaluate, method) for method in config.evaluate.methods},
        held_out=held_out_tasks(config),
        reading=config.evaluate.reading,
    )
    results = {
        "name": config.name,
        "command": command,
        "commit": commit,
        "seed": config.seed,
        "split": config.evaluate.split,
        "rows": rows,
        "stages": stages,
        "shown": shown_figures(prepare, evaluate),
    }
    if config.evaluate.reading != "passages":
        passages = reading.summary(evaluate.read("reading"))
        results["reading"] = {"how": config.evaluate.reading, "passages": passages}
    if "agreement" in artifacts:
        judged = artifacts["agreement"].read("agreement")
        results["agreement"] = agreement_rows(judged, samples=config.evaluate.bootstrap_samples, seed=config.seed)
        labels = artifacts["agreement"].read("label_separation")
        results["label_separation"] = separation_rows(
            labels, samples=config.evaluate.bootstrap_samples, seed=config.seed
        )
    of: dict[str, Any] = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    shown_to = {LLM: "canaries"} | {name: stage_of("canary", name) for name in config.annotators}
    if found := {name: artifacts[made] for name, made in shown_to.items() if made in artifacts}:
        rates = {name: fooled_rates(made.read("canaries"), **of) for name, made in found.items()}
        results["canaries"] = [{"annotator": name} | row for name, rows in rates.items() for row in rows]
    if (said := _annotations(artifacts)) is not None:
        qrels = prepare.read("qrels").to_pylist()
        gold = {(row["query_id"], row["doc_id"]) for row in qrels if row["relevance"] > 0}
        first = said.filter(pc.equal(said["round"], 1))
        is_part = 0 < first.num_rows < said.num_rows
        of_first = {"first_round": compared(first, gold, **of) if is_part else None}
        results["annotators"] = compared(said, gold, **of) | of_first
    if "labels" in artifacts:
        results["labeling"] = artifacts["labels"].require()["extra"]["rounds"]
    if "generate" in artifacts:
        results["questions"] = questions_told(artifacts["generate"].read("generated"))
    # Papers report test splits.
    if config.report.reproduces and config.evaluate.split == "test":
        results["published"] = beside_published(config, rows)
    if "leakage" in artifacts:
        results["leakage"] = _leakage(artifacts, stages)
    if (audited := write_audit(run_dir, config, artifacts)) is not None:
        results["audit"] = audited
    write_atomic(run_dir / "results.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    queries = prepare.read("queries")
    evaluated = set(evaluate.read("metrics")["query_id"].to_pylist())
    datasets = {
        row["query_id"]: row["dataset"]
        for row in queries.select(["query_id", "dataset"]).to_pylist()
        if row["query_id"] in evaluated
    }
    write_trec(run_dir / "trec", evaluate.read("run"), prepare.read("qrels"), datasets)
    write_atomic(run_dir / "report.html", _html(config, artifacts, results, run_dir).encode())
    if "checkpoint" in artifacts:
        with staged(run_dir / "embedder") as temporary:
            shutil.copytree(artifacts["checkpoint"].file("embedder"), temporary)
    return results


LEAKS = {
    "same_text": "Same text",
    "near_text": "Near copy",
    "in_document": "Inside a document",
    "other_numbers": "Near but for numbers",
}
"""What the page calls the kinds of copies."""

LEAK_PLACES = {
    "training": "among training queries",
    "documents": "among examples that may be retrieved",
    "passages": "among the documents that they are to find (no leak by itself)",
}
"""Where the terminal says that copies are, by the part of the figures."""

REMOVED = ("duplicate_of_test", "example_of_held_out_query")
"""What `prepare` leaves out so that no test query is learned: reasons of its accounting."""


def _leakage(artifacts: dict[str, Artifact], stages: list[dict[str, Any]]) -> dict[str, Any]:
    prepare = artifacts["prepare"]
    skipped: dict[str, int] = next((stage["skipped"] for stage in stages if stage["stage"] == "prepare"), {})
    removed = {reason: skipped.get(reason, 0) for reason in REMOVED}
    found = artifacts["leakage"].read("leakage")
    documents = prepare.read("corpus", columns=["doc_id", "text"], ids=found["other_id"].to_pylist())
    return leakage_figures(found, prepare.read("queries"), removed, documents)


def _short(method: str) -> str:
    """What a narrow column calls a method."""
    return method_name(method).removesuffix(" embedder")


TABLE_WIDTH = 160
"""Columns that the terminal's table may take, whatever the terminal's width."""


def print_table(results: dict[str, Any], console: Console) -> None:
    """Prints every figure to the terminal: a row per data set and measure, a column per method."""
    arranged = tables(results["rows"])
    methods = in_order({method for table in arranged for method in table.methods})
    result = result_of(methods)
    compared = f"difference: {_short(result)} minus {_short('base')}".lower()
    view = TerminalTable(title=f"{results['name']}: {SPLITS_TOLD[results['split']]} figures ({compared}, 95% interval)")
    for heading in ("data set", "measure", "n"):
        view.add_column(heading, no_wrap=True)
    for method in methods:
        view.add_column(_short(method), justify="right", no_wrap=True)
    view.add_column("difference", no_wrap=True)
    view.add_column("p", no_wrap=True)
    for table in arranged:
        for column in table.columns:
            cells = []
            for method in methods:
                figure = column.figures.get(method)
                text = f"{figure['mean']:.3f}" if figure else ""
                cells.append(Text(text, style="bold" if method in column.best else ""))
            trained = column.figures.get(result)
            delta = trained["delta_vs_base"] if trained else None
            difference, p = Text(), ""
            if trained and delta:
                colour = {"better": "green", "worse": "red", "": "default"}[effect(trained)]
                low, high = delta["ci95"]
                difference = Text.assemble((f"{delta['mean']:+.3f}", colour), f" ({low:+.3f}, {high:+.3f})")
                p = p_text(delta["p"]).removeprefix("p=").removeprefix("p")
            measure = f"{column.measure} {'↓' if column.lower_is_better else '↑'}"
            view.add_row(column.dataset, measure, str(column.n), *cells, difference, p)
        view.add_section()
    # Job logs and narrow terminals would cut figures off; a line that the terminal wraps loses none.
    view.width = console.measure(view, options=console.options.update(max_width=TABLE_WIDTH)).maximum
    console.print(view, crop=False)
    if told := results.get("reading"):
        retrieved, dropped = (sum(row[what] for row in told["passages"]) for what in ("passages", "dropped"))
        console.print(f"questions were answered by reading: {told['how']}; {dropped} of {retrieved} passages not read")
    for row in results.get("agreement", []):
        low, high = row["ci95"]
        line = f"{judge_name(row['judge'])}: agrees with the LLM on held-out queries, tau {row['mean']:.3f} "
        line += f"({low:.3f}, {high:.3f}), n={row['n']}"
        if delta := row["delta_vs_base"]:
            line += f"; {delta['mean']:+.3f} ({delta['ci95'][0]:+.3f}, {delta['ci95'][1]:+.3f}) against base"
        console.print(line)
    for stage, warning in stage_warnings(results["stages"]):
        console.print(f"{stage}: warning: {warning}", style="yellow")
    for where, place in LEAK_PLACES.items():
        for row in results.get("leakage", {}).get(where, []):
            if row["kinds"]:
                told = ", ".join(f"{count} {LEAKS[kind].lower()}" for kind, count in row["kinds"].items())
                console.print(f"{row['dataset']}: of {row['n']} test queries {place}: {told}")
    for row in results.get("questions", []):
        dropped = ", ".join(f"{count} {reason}" for reason, count in row["dropped"].items())
        line = f"{row['dataset']}: {row['asked']} questions about {row['documents']} documents asked for, "
        console.print(f"{line}{row['written']} written, {row['kept']} kept; not kept: {dropped or 'none'}")


def _annotations(artifacts: dict[str, Artifact]) -> pa.Table | None:
    """Who labelled what how: query_id, doc_id, annotator, label, round. None where nobody labelled.

    Where labels are made in rounds, those of all rounds. Without rounds what was said of the last candidates, as one
    round.
    """
    scores, in_rounds = artifacts.get("llm_scores"), artifacts.get("labels")
    if scores is None:
        return None
    if in_rounds is not None and "annotations" in in_rounds.require()["rows"]:
        said = in_rounds.read("annotations")
    elif in_rounds is not None:
        labels = in_rounds.read("labels")
        labels = labels.filter(pc.not_equal(labels["source"], "retriever"))
        said = labels.select(["query_id", "doc_id", "label", "source", "round"]).rename_columns({"source": "annotator"})
    else:
        if "annotations" in scores.require()["rows"]:
            said = scores.read("annotations")
        else:
            labels = scores.read("llm_scores")
            labels = labels.filter(pc.equal(labels["kind"], "label")).select(["query_id", "doc_id", "label"])
            said = labels.append_column("annotator", pa.array(["llm"] * labels.num_rows, pa.string()))
        said = said.append_column("round", pa.array([1] * said.num_rows, pa.int32()))
    return said if said.num_rows else None


def labels_told(told: dict[str, Any]) -> dict[str, Any]:
    """A round of labelling as a row of the report: counts of labels by who gave them, and how many of these are right.

    Args:
        told: an entry of `labeling` of results.json.
    """
    by_source = {
        source: {
            label: sum(
                row["num_pairs"] for row in told["distribution"] if (row["source"], row["label"]) == (source, label)
            )
            for label in (1.0, 0.5, 0.0, None)
        }
        for source in (told["annotator"], "retriever")
    }
    precision = {(row["source"], row["label"]): row["precision"] for row in told["quality"]}
    calibration = told["calibration"] or {}
    spent = ("calls", "spent", "requests", "tokens", "pairs")
    same = ("round", "annotator", *spent, "thresholds", "ndcg_before", "ndcg", "audit", "stop")
    return {
        **{name: told[name] for name in same},
        "labels": by_source[told["annotator"]],
        "pseudo": by_source["retriever"],
        "right": [[precision.get((source, label)) for label in (1.0, 0.0)] for source in by_source],
        "ece": calibration.get("ece"),
        "notes": calibration.get("notes", []),
    }


def questions_told(generated: pa.Table) -> list[dict[str, Any]]:
    """What became of the questions about each data set's documents: counts, and of those not kept by reason."""
    told = []
    for dataset in sorted(set(generated["dataset"].to_pylist())):
        rows = generated.filter(pc.equal(generated["dataset"], dataset)).to_pylist()
        told.append(
            {
                "dataset": dataset,
                "documents": len({row["doc_id"] for row in rows}),
                "asked": len(rows),
                "written": sum(row["question"] is not None for row in rows),
                "kept": sum(row["reason"] is None for row in rows),
                "dropped": dict(Counter(row["reason"] for row in rows if row["reason"] is not None).most_common()),
            }
        )
    return told


def judge_name(judge: str) -> str:
    """What a table calls a judge of candidates."""
    return "Reward model" if judge == REWARD_MODEL else method_name(judge)


def _rests_on(evaluate: Artifact, method: str) -> dict[str, str]:
    """The artifacts that a method's figures were made from."""
    inputs = evaluate.spec.inputs
    mine = {"prepare": inputs["prepare"], "evaluate": evaluate.id}
    return mine | {role: inputs[f"{role}_{method}"] for role in ("embeddings", "index") if f"{role}_{method}" in inputs}


def _html(config: Config, artifacts: dict[str, Artifact], results: dict[str, Any], run_dir: Path) -> str:
    arranged = tables(results["rows"])
    result = result_of(config.evaluate.methods)
    others = [method for method in config.evaluate.methods if method != result]
    return render(
        "report.html.j2",
        **{key: results[key] for key in ("name", "command", "commit", "seed", "stages")},
        split=SPLITS_TOLD[results["split"]],
        embedder=config.embedder.model,
        llm=config.llm.model,
        # The difference to the base embedder alone stands in the first table.
        leads=others if set(others) - {"base"} else [],
        headline=[column for table in arranged for column in table.columns if column.is_main],
        tables=arranged,
        method_names={method: method_name(method) for method in config.evaluate.methods},
        result=result,
        effect=effect,
        p_text=p_text,
        curves=_curves(artifacts),
        speed=_speed(artifacts),
        looks=_looks(artifacts, run_dir),
        agreement=results.get("agreement"),
        label_separation=results.get("label_separation"),
        judge_name=judge_name,
        annotators=results.get("annotators"),
        canaries=results.get("canaries", []),
        warnings=stage_warnings(results["stages"]),
        shown=results["shown"],
        reading=results.get("reading"),
        score_floor=config.evaluate.score_floor,
        labeling=[labels_told(told) for told in results.get("labeling", [])],
        questions=results.get("questions"),
        published=results.get("published", []),
        audit=results.get("audit"),
        leakage=results.get("leakage"),
        leakage_kinds={kind: LEAKS[kind] for kind in KINDS},
        histograms=_histograms(artifacts),
        training_examples=training_examples(artifacts),
        test_examples=test_examples(artifacts, result),
        configuration=to_yaml(config),
    )


def _curves(artifacts: dict[str, Artifact]) -> Markup | None:
    if "checkpoint" not in artifacts:
        return None
    steps = artifacts["checkpoint"].read("steps").to_pylist()
    # The figure is our own drawing and holds no text from the data.
    return Markup(plots.training_curves(steps)) if steps else None


def _speed(artifacts: dict[str, Artifact]) -> dict[str, float] | None:
    return artifacts["checkpoint"].require()["extra"].get("speed") if "checkpoint" in artifacts else None


def _looks(artifacts: dict[str, Artifact], run_dir: Path) -> Markup | None:
    looks = read_looks(run_dir, artifacts["checkpoint"].id) if "checkpoint" in artifacts else []
    return Markup(plots.look_curves(looks, MEASURE)) if looks else None


def _histograms(artifacts: dict[str, Artifact]) -> Markup | None:
    if "rewards" not in artifacts:
        return None
    rewards = artifacts["rewards"].read("rewards")
    if not rewards.num_rows:
        return None
    queries = artifacts["prepare"].read("queries").select(["query_id", "dataset"])
    joined: pa.Table = rewards.select(["query_id", "reward"]).join(queries, "query_id", join_type="inner")
    by_dataset: dict[str, list[float]] = defaultdict(list)
    for row in joined.select(["dataset", "reward"]).drop_null().to_pylist():
        by_dataset[row["dataset"]].append(row["reward"])
    return Markup(plots.reward_histograms(by_dataset))
