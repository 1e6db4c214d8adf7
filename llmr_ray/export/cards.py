"""README.md of what is exported, with the front matter that the hub reads: dataset card and model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llmr_ray.config import Config, training_seed
from llmr_ray.data.splits import SPLITS_TOLD
from llmr_ray.index.vectors import own_limits

_COLUMNS = {
    "flag_embedding": "`query`, `pos`, `neg`; `pos_scores` and `neg_scores` are the rewards where the task has them. "
    "`pos_id` and `neg_id` name the documents.",
    "llm_embedder": "`query`, `pos`, `neg`, `answers`, `task`; `teacher_scores` are the rewards of `pos` and "
    "then of `neg`.",
    "tevatron": "`query`, `positive_passages`, `negative_passages` ({docid, title, text}); titles stand in the texts.",
    "sentence_transformers": "`query`, `positive`, `negative_1`, …; `label` holds the rewards of the positive and the "
    "negatives, in this order, where the task has them.",
}

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What the export was made from: artifact ids by stage, and the command that repeats it."""

    artifacts: Mapping[str, str]
    command: str


def dataset_card(
    config: Config,
    form: str,
    files: Mapping[str, int],
    left_out: Mapping[str, int],
    of: Provenance,
    *,
    license_name: str = "",
) -> str:
    """The card of exported training data.

    Args:
        config: the run's.
        form: the format.
        files: rows of each file; a file's folder is its data set's name.
        left_out: what the format could not hold, by reason.
        of: where it comes from.
        license_name: as the hub knows it; the data sets' own licences decide. Empty: left for the reader to say.
    """
    configs = [
        {"config_name": name.split("/")[-2], "data_files": [{"split": "train", "path": name}]} for name in sorted(files)
    ]
    front = _with_license(license_name) | {
        "pretty_name": f"{config.name} training data",
        "task_categories": ["text-retrieval"],
        "tags": ["llmr_ray", "dense-retrieval", "llm-feedback"],
        "size_categories": [_size(sum(files.values()))],
        "configs": configs,
    }
    rows = [[name, f"{number:,}"] for name, number in sorted(files.items())]
    feedback = [[name, config.tasks[name].score.feedback] for name in _tasks(config)]
    parts = [
        f"# Training data of {config.name}",
        f"Training groups of a retriever, made by llmr_ray in the format `{form}`: {_COLUMNS[form]}",
        "Positives are documents that the data labels relevant or, where it labels none, the one with the best reward.",
        _table(["file", "rows"], rows),
        "## Rewards",
        f"Feedback of `{config.llm.model}` by task (`none`: labels alone; `given`: scores that came with the data):",
        _table(["task", "feedback"], feedback),
        *_told_left_out(left_out),
        *_origin(config, of),
        "The texts are those of the data sets; their licences apply.",
    ]
    return _card(front, parts)


def model_card(
    config: Config,
    figures: Mapping[str, Mapping[str, Mapping[str, float]]],
    of: Provenance,
    *,
    base_model: str,
    license_name: str = "",
) -> str:
    """The card of a trained embedder.

    Args:
        config: the run's.
        figures: by data set, method and MTEB's name of a measure; methods are "base" and "trained" where evaluated.
        of: where it comes from.
        base_model: a hub name, or empty.
        license_name: as the hub knows it; the base model's licence decides. Empty: left for the reader to say.
    """
    front: dict[str, Any] = _with_license(license_name) | {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "dense-retrieval", "llmr_ray"],
    }
    if base_model:
        front["base_model"] = base_model
    if trained := {dataset: methods["trained"] for dataset, methods in figures.items() if "trained" in methods}:
        front["model-index"] = [
            {"name": config.name, "results": [_result(config, *item) for item in sorted(trained.items())]}
        ]
    shown = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
    rows = [
        [dataset, method, *(f"{values[name]:.4f}" for name in shown)]
        for dataset, methods in sorted(figures.items())
        for method, values in methods.items()
    ]
    names = [
        [name, config.tasks[name].query_instruction, config.tasks[name].document_instruction] for name in _tasks(config)
    ]
    instructions = (
        [
            "Every task has instructions of its own, saved as prompts `TASK-query` and `TASK-document`:",
            _table(["task", "query", "document"], names),
        ]
        if config.train.instructions
        else ["It was trained without instructions: the prompts `TASK-query` and `TASK-document` are empty."]
    )
    first = _tasks(config)[0]
    parts = [
        f"# {config.name}",
        f"An embedder for retrieval, trained from `{config.embedder.model}` by the feedback of `{config.llm.model}` "
        "with llmr_ray. It loads with sentence-transformers and needs no other code.",
        "```python\n"
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        f'queries = model.encode(["..."], prompt_name="{first}-query")\n'
        f'documents = model.encode(["..."], prompt_name="{first}-document")\n'
        "scores = model.similarity(queries, documents)\n"
        "```",
        *instructions,
        f"Queries are cut to {config.embedder.max_query_tokens} tokens, documents to "
        f"{config.embedder.max_document_tokens}.",
        *(
            f"Those of `{task}` were embedded up to {own[0]} and {own[1]}."
            for task, own in own_limits(config, _tasks(config)).get("limits", {}).items()
        ),
        "## Figures",
        *(
            [
                f"Means over the {SPLITS_TOLD[config.evaluate.split]} queries of the run's data sets with labels.",
                _table(["data set", "method", *shown], rows),
            ]
            if rows
            else ["None of the run's data sets has labels, or it was not evaluated."]
        ),
        "## Training",
        f"{config.train.num_steps:,} steps of {config.train.global_batch_size} queries, groups of "
        f"{config.train.group_size}, learning rate {config.train.learning_rate:g}, temperature "
        f"{config.train.temperature:g}, seed {training_seed(config, config.train)}, {config.rounds} "
        f"round{'s' if config.rounds > 1 else ''}.",
        *_origin(config, of),
    ]
    return _card(front, parts)


def _tasks(config: Config) -> list[str]:
    return sorted({dataset.task for dataset in config.datasets.values()})


def _with_license(name: str) -> dict[str, Any]:
    return {"license": name} if name else {}


def _result(config: Config, dataset: str, values: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": "information-retrieval", "name": "Information Retrieval"},
        "dataset": {"name": dataset, "type": dataset, "split": config.evaluate.split},
        "metrics": [{"type": name, "name": name, "value": round(value, 6)} for name, value in sorted(values.items())],
    }


def _size(number: int) -> str:
    return next((name for limit, name in _SIZES if number < limit), "n>1M")


def _told_left_out(left_out: Mapping[str, int]) -> list[str]:
    rows = [[reason.replace("_", " "), f"{number:,}"] for reason, number in sorted(left_out.items()) if number]
    return ["Left out, because the format cannot hold it:", _table(["what", "number"], rows)] if rows else []


def _origin(config: Config, of: Provenance) -> list[str]:
    data = [[name, dataset.task, dataset.source] for name, dataset in sorted(config.datasets.items())]
    return [
        "## Origin",
        f"Made by `{of.command}` from {', '.join(f'{stage} `{name}`' for stage, name in of.artifacts.items())}.",
        _table(["data set", "task", "source"], data),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|").strip() for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _card(front: Mapping[str, Any], parts: Sequence[str]) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"
