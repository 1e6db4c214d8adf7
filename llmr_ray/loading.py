"""Configurations from YAML: files merged left to right, overrides last, every key and value checked."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llmr_ray.config import (
    ENDPOINTS,
    Config,
    DatasetConfig,
    RewardModelConfig,
    RuntimeConfig,
    TaskTrain,
    TrainConfig,
    question_tasks,
)
from llmr_ray.data.memory import CHUNK_TOKENS, TARGET_CHUNKS
from llmr_ray.errors import ConfigError
from llmr_ray.labeling.checks import check_labeling, check_labels, check_questions, check_quotes

CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("qa", "convsearch", "chat", "lrlm", "icl", "tool"),
    "pooling": ("auto", "cls", "mean", "last", "decoder"),
    "similarity": ("cosine", "dot"),
    "precision": ("auto", "float32", "bfloat16", "int8"),
    "engine": ("vllm", "transformers", *ENDPOINTS),
    "llm_scoring": ("auto", "tree", "engine"),
    "dtype": ("auto", "float32", "bfloat16"),
    "feedback": ("none", "likelihood", "rank", "label", "given"),
    "samples": ("fresh", "shared"),
    "normalization": ("mean", "sum"),
    "positive": ("first", "random", "teacher", "teacher_gold", "gold_and_teacher"),
    "negatives": ("random", "first", "lowest", "highest"),
    "tie_policy": ("strict", "sorted"),
    "position0": ("gold_first", "by_reward"),
    "reward_form": ("raw", "exp", "zscore", "minmax"),
    "trackers": ("tensorboard", "mlflow", "wandb"),
    "kl_direction": ("teacher_student", "student_teacher"),
    "schedule": ("linear", "constant"),
    "batching": ("homogeneous", "heterogeneous", "mixed"),
    "batch_by": ("dataset", "task"),
    "prompt": ("llm_embedder", "llm_r"),
    "icl_protocol": ("llm_embedder", "llm_r"),
    "icl_demotion": ("none", "other_tasks", "other_tasks_by_test_name"),
    "policy": ("adaptive", "uncertainty", "random"),
    "annotator": ("llm", "gold"),
    "calibrator": ("platt", "isotonic"),
    "demonstrations": ("clustered", "drawn"),
    "mix": ("proportional", "temperature", "round_robin"),
    "sampling": ("each_epoch", "once"),
    "false_negatives": ("masked", "kept"),
    "lone_weight": ("used", "ignored"),
    "answer_match": ("exact", "alias_inside"),
    "icl_cut": ("least_similar", "most_similar"),
    "order": ("shuffled", "sequential"),
    "self_paced_by": ("task", "dataset"),
    "reading": ("passages", "evidence", "vote"),
    "index_scan": ("auto", "float32", "int8"),
    "window_end": ("output", "text"),
    "kind": ("flat", "ivf_sq8", "ivf_pq", "hnsw", "cagra"),
}

BOUNDED = ("qa", "icl", "chat")
"""Tasks whose prompts can have a limit of their own (evaluate.prompt_tokens); long texts have their window."""

QA_PROTOCOLS = ("ours", "mmlu", "popqa", "nq")
"""How a data set of qa can be asked (evaluate.qa_protocols)."""


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, the files it names under `base` (first), and ``key=value`` overrides (last).

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a wrong type, a value out of its choices.
    """
    # In one call: each copies what it merges into.
    merged: Any = OmegaConf.merge({}, *_layers(Path(path), ()))
    for item in overrides or []:
        if "=" not in item:
            raise ConfigError(f"'{item}' is not an override. Write key=value, for example train.num_steps=50.")
    merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides or [])))
    plain = OmegaConf.to_container(merged, resolve=True)
    _check_keys(plain, Config, "")
    _inherit(merged, plain)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    _check_values(config, "")
    _check_run(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def read_yaml(path: Path) -> Any:
    """What a file says, as OmegaConf has it; ConfigError where it is not YAML."""
    try:
        return OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _layers(path: Path, seen: tuple[Path, ...]) -> list[Any]:
    if not path.exists():
        raise ConfigError(f"there is no config file {path}. Look in conf/ or give a path to your own YAML.")
    if path in seen:
        raise ConfigError(f"{path} names itself under `base` through {[str(p) for p in seen]}.")
    layer = read_yaml(path)
    bases = layer.pop("base", []) if OmegaConf.is_dict(layer) else []
    layers = []
    for base in [bases] if isinstance(bases, str) else bases:
        layers += _layers((path.parent / base).resolve(), (*seen, path))
    return [*layers, layer]


def _inherit(merged: Any, plain: Any) -> None:
    """Gives the other LLMs what they leave unsaid of how `llm` is asked, so that all read the same text; which LLM each
    is they say themselves. Of a chat the tokenizer (`model`) only cuts prompts, so it may be that of `llm` too."""
    llm, annotators = (plain.get(part) if isinstance(plain.get(part), dict) else {} for part in ("llm", "annotators"))
    others = {"reader": plain.get("reader")} | {f"annotators.{name}": said for name, said in annotators.items()}
    for where, said in others.items():
        if not isinstance(said, dict):
            continue
        is_chat = said.get("engine", llm.get("engine")) == "openai_chat"
        if not said.get("model") and not is_chat:
            raise ConfigError(
                f"{where} does not say which LLM it is. Set {where}.model; behind an endpoint it names the folder or "
                "hub name of the tokenizer."
            )
        own = ("endpoint", "endpoint_model") if is_chat else ("endpoint", "endpoint_model", "model")
        OmegaConf.update(merged, where, {name: value for name, value in llm.items() if name not in own} | said)


def _check_keys(value: Any, kind: Any, where: str) -> None:
    """Fails on keys no dataclass knows; OmegaConf's own message does not name the nearest one."""
    if not dataclasses.is_dataclass(kind) or not isinstance(value, dict):
        return
    fields = {item.name: item.type for item in dataclasses.fields(kind)}
    for key, inner in value.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), n=1)
            hint = f" Did you mean '{where}{near[0]}'?" if near else f" Known keys: {sorted(fields)}."
            raise ConfigError(f"unknown setting '{where}{key}'.{hint}")
        inner_kind: Any = fields[key]
        if getattr(inner_kind, "__origin__", None) is dict and dataclasses.is_dataclass(inner_kind.__args__[1]):
            for name, item in (inner or {}).items():
                _check_keys(item, inner_kind.__args__[1], f"{where}{key}.{name}.")
        else:
            _check_keys(inner, inner_kind, f"{where}{key}.")


def _check_values(value: Any, where: str) -> None:
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        if dataclasses.is_dataclass(inner):
            _check_values(inner, f"{where}{item.name}.")
        elif isinstance(inner, dict):
            for name, entry in inner.items():
                if dataclasses.is_dataclass(entry):
                    _check_values(entry, f"{where}{item.name}.{name}.")
        elif item.name in CHOICES:
            for chosen in inner if isinstance(inner, list) else [inner]:
                if chosen not in CHOICES[item.name]:
                    choices = ", ".join(CHOICES[item.name])
                    raise ConfigError(f"'{where}{item.name}' is '{chosen}', but must be one of {choices}.")
        elif isinstance(inner, (int, float)) and inner < 0 and item.name not in ("min_reward", "min_gain"):
            raise ConfigError(f"'{where}{item.name}' is {inner}, but may not be negative.")


def _check_pool(config: Config, name: str, dataset: DatasetConfig) -> None:
    where = f"datasets.{name}.pool is '{dataset.pool}'"
    if dataset.task in ("chat", "lrlm", "icl"):
        raise ConfigError(
            f"{where}, but in the task '{dataset.task}' a pool is what one dialogue or text holds, or all examples. "
            "Leave it out."
        )
    namesake = config.datasets.get(dataset.pool)
    if namesake is not None and namesake.pool != dataset.pool:
        raise ConfigError(f"{where}, a data set that does not name it: set datasets.{dataset.pool}.pool to it, too.")
    tasks = sorted({other.task for other in config.datasets.values() if other.pool == dataset.pool})
    if len(tasks) > 1:
        raise ConfigError(
            f"{where}, as in data sets of the tasks {', '.join(tasks)}, but what is searched together is embedded "
            "with the instructions of one task. Give each task a pool of its own."
        )


def _check_run(config: Config) -> None:
    for name, dataset in config.datasets.items():
        if dataset.task not in config.tasks:
            raise ConfigError(
                f"data set '{name}' belongs to task '{dataset.task}', which `tasks` does not define. Defined: "
                f"{sorted(config.tasks)}. Put `base: llm_embedder.yaml` at the top, or define the task."
            )
        if dataset.pool:
            _check_pool(config, name, dataset)
        if dataset.given_rewards and dataset.source != "llm_r":
            raise ConfigError(
                f"datasets.{name}.given_rewards names files of LLM-R's, but its source is '{dataset.source}', which "
                "has a teacher's scores in its rows or none. Leave it out, or take source llm_r."
            )
    annotators = {f"annotators.{name}": llm for name, llm in config.annotators.items()}
    for where, llm in {"llm": config.llm, "reader": config.reader, **annotators}.items():
        if llm is not None and llm.engine in ENDPOINTS and not (llm.endpoint and llm.endpoint_model):
            raise ConfigError(
                f"{where}.engine={llm.engine} needs {where}.endpoint (a base URL) and {where}.endpoint_model (the name "
                "there)."
            )
    _check_chat_route(config)
    _check_train(config.train, "train", config.runtime)
    for name, task in config.tasks.items():
        _check_turns(f"tasks.{name}.train", task.train)
        check_labels(name, task.score)
        check_questions(name, task.questions)
        unasked = task.score.same_task or task.score.same_label or task.score.num_first
        if unasked and not config.reward_model.model:
            _check_without_rewards(f"tasks.{name}", task.train)
    check_quotes(config)
    if config.index.least_recall > 1 or not config.index.num_links:
        raise ConfigError("index.least_recall is a share of 1 at the most, and index.num_links at least 1.")
    if config.rounds < 1:
        raise ConfigError("rounds must be at least 1.")
    if config.reward_model.model:
        _check_reward_model(config.reward_model, config.runtime)
        tasks = {dataset.task for dataset in config.datasets.values() if dataset.num_train}
        if given := sorted(task for task in tasks if config.tasks[task].score.feedback == "given"):
            raise ConfigError(
                f"reward_model.model is set, but the rewards of {', '.join(given)} come with the data (score.feedback: "
                "given) and need no model in between. Leave reward_model.model empty, or let the LLM give the feedback."
            )
        if all(config.tasks[task].score.feedback == "none" for task in tasks):
            raise ConfigError(
                f"reward_model.model is set, but none of the tasks that train {sorted(tasks)} has LLM feedback for it "
                "to learn from. Set score.feedback of a task, or leave reward_model.model empty."
            )
    if config.labeling.enabled or config.annotators:
        check_labeling(config)
    _check_windows(config)
    _check_split(config)
    _check_reading(config)
    _check_embedder(config)
    if config.reward_model.precision == "int8":
        raise ConfigError("reward_model.precision is 'int8', but 8 bits are for embedding alone. Take auto.")
    if config.prepare.test_fraction + config.prepare.dev_fraction >= 1:
        raise ConfigError("prepare.test_fraction + prepare.dev_fraction leave nothing to train on.")


def _check_windows(config: Config) -> None:
    """Long texts are cut into windows when queries are made, and read whole or shortened when these are evaluated."""
    evaluate = config.evaluate
    for name, dataset in config.datasets.items():
        if dataset.task != "lrlm":
            continue
        outputs = TARGET_CHUNKS if dataset.window_end == "text" else 0
        window, least = dataset.window_tokens, (outputs + 1) * CHUNK_TOKENS
        if window % CHUNK_TOKENS or window < least:
            raise ConfigError(
                f"datasets.{name}.window_tokens is {window}, but a window is made of whole chunks of {CHUNK_TOKENS} "
                f"tokens, and with window_end '{dataset.window_end}' of at least {least}. Published: 2048."
            )
        if not evaluate.num_llm_queries.get(name, 0):
            continue
        if evaluate.lrlm_window_tokens > window:
            raise ConfigError(
                f"evaluate.lrlm_window_tokens is {evaluate.lrlm_window_tokens}, but the queries of '{name}' hold "
                f"{window} tokens of recent text: nothing would be added. Set datasets.{name}.window_tokens as well."
            )
        where, room = ("reader", config.reader) if config.reader is not None else ("llm", config.llm)
        # With the desired output: it lies in a window that ends with the text.
        shown = evaluate.lrlm_window_tokens + (0 if dataset.window_end == "text" else CHUNK_TOKENS)
        retrieved = evaluate.lrlm_chunks * 2 * CHUNK_TOKENS
        # Engines keep one position, so that a model of 4,096 tokens reads 4,095: one may lack.
        if shown + retrieved > room.max_model_tokens + 1:
            raise ConfigError(
                f"'{name}' is read with {retrieved} retrieved tokens (evaluate.lrlm_chunks of 256) and {shown} of "
                f"window and desired output, but {where}.max_model_tokens is {room.max_model_tokens}: what is "
                "retrieved would be cut away, in part or whole. Raise it, or take fewer chunks or a shorter window."
            )


def _check_embedder(config: Config) -> None:
    if config.embedder.pooling == "decoder":
        raise ConfigError(
            "embedder.pooling is 'decoder', but what is trained is saved for sentence-transformers, which has no class "
            "that runs a decoder. Name such an embedder under evaluate.embedders, and train with cls, mean or last."
        )
    for name, task in config.tasks.items():
        for limit in ("max_query_tokens", "max_document_tokens"):
            if (own := getattr(task.embed, limit)) > (most := getattr(config.embedder, limit)):
                raise ConfigError(
                    f"tasks.{name}.embed.{limit} is {own}, above embedder.{limit} {most}. Raise the latter."
                )
    cosines = {"labeling.enabled": config.labeling.enabled, "questions.num_documents": bool(question_tasks(config))}
    if config.embedder.similarity == "dot" and (found := [setting for setting, is_set in cosines.items() if is_set]):
        raise ConfigError(
            f"embedder.similarity is 'dot', but {found[0]} has margins of cosines, which inner products do not keep "
            "to. Take cosine."
        )


def _check_chat_route(config: Config) -> None:
    trained = {dataset.task for dataset in config.datasets.values() if dataset.num_train}
    scored = sorted(task for task in trained if config.tasks[task].score.feedback == "likelihood")
    if config.llm.engine == "openai_chat" and scored:
        raise ConfigError(
            f"llm.engine=openai_chat gives outputs alone, but score.feedback of {', '.join(scored)} is likelihood. "
            "Take label or rank, or an endpoint with completions that echo log-probabilities (llm.engine=openai)."
        )


def _check_split(config: Config) -> None:
    split = config.evaluate.split
    if split not in ("test", "dev"):
        raise ConfigError(f"evaluate.split is '{split}', but must be test or dev: no other queries are held out.")
    if split == "test":
        return
    if not any(dataset.num_dev for dataset in config.datasets.values()):
        raise ConfigError(
            "evaluate.split is 'dev', but no data set has development queries: there is nothing to evaluate. Set "
            "num_dev of those to compare on."
        )
    if asked := sorted(name for name, protocol in config.evaluate.qa_protocols.items() if protocol == "nq"):
        raise ConfigError(
            f"evaluate.split is 'dev', but evaluate.qa_protocols asks {asked} after demonstrations of the development "
            "split, with their answers. Take the protocol ours while choosing."
        )


def _check_reading(config: Config) -> None:
    evaluate = config.evaluate
    if evaluate.score_floor > 1:
        raise ConfigError(f"evaluate.score_floor is {evaluate.score_floor}, but no passage is labelled above 1.")
    answered = {name for name, count in evaluate.num_llm_queries.items() if count and name in config.datasets}
    if evaluate.reading != "passages" and "qa" not in {config.datasets[name].task for name in answered}:
        raise ConfigError(
            f"evaluate.reading is '{evaluate.reading}', but there is no question whose answer would change: the LLM "
            "answers none of the task qa. Set evaluate.num_llm_queries for one of its data sets."
        )
    for name, protocol in evaluate.qa_protocols.items():
        if protocol not in QA_PROTOCOLS:
            raise ConfigError(
                f"evaluate.qa_protocols.{name} is '{protocol}', but must be one of {', '.join(QA_PROTOCOLS)}."
            )
        if name not in config.datasets or config.datasets[name].task != "qa":
            raise ConfigError(
                f"evaluate.qa_protocols says how '{name}' is asked, but that is no data set of the task qa. "
                "Leave it out."
            )
    said = {"qa": evaluate.qa_max_new_tokens, "icl": evaluate.icl_max_new_tokens}
    for task, limit in evaluate.prompt_tokens.items():
        if task not in BOUNDED:
            raise ConfigError(
                f"evaluate.prompt_tokens.{task}: only {', '.join(BOUNDED)} can have a limit. Long texts have "
                "evaluate.lrlm_window_tokens; other tasks are measured without an LLM."
            )
        if limit <= said.get(task, 0):
            raise ConfigError(
                f"evaluate.prompt_tokens.{task} is {limit}, of which the answer takes {said.get(task, 0)} tokens, so "
                "nothing is left for the prompt. Raise it, or leave it out: then the limit is what the LLM reads."
            )
    published = sorted(name for name, protocol in evaluate.qa_protocols.items() if protocol != "ours")
    if evaluate.reading != "passages" and published:
        raise ConfigError(
            f"evaluate.reading is '{evaluate.reading}', but evaluate.qa_protocols asks {published} as published, with "
            "all passages before the question. Take passages, or the protocol ours."
        )
    if evaluate.reading == "vote" and not config.train.temperature:
        raise ConfigError(
            "evaluate.reading is 'vote', which divides retrieval scores by train.temperature, but it is 0."
        )


def _check_train(train: TrainConfig, where: str, runtime: RuntimeConfig) -> None:
    if train.global_batch_size % max(1, runtime.train_workers):
        raise ConfigError(
            f"{where}.global_batch_size {train.global_batch_size} does not divide over {runtime.train_workers} train "
            "workers; unequal slices would change the gradient."
        )
    if train.batching == "heterogeneous" and train.global_batch_size % max(1, train.batch_shares):
        raise ConfigError(
            f"{where}.global_batch_size {train.global_batch_size} does not divide into the {train.batch_shares} equal "
            f"parts of a heterogeneous batch. Change {where}.batch_shares."
        )
    if train.order == "sequential" and (train.batching != "homogeneous" or train.mix == "round_robin"):
        raise ConfigError(
            f"{where}.order is sequential, which homogeneous batches can follow, but {where}.batching is "
            f"'{train.batching}' and {where}.mix '{train.mix}'. Take homogeneous batches without turns."
        )
    if train.gather_devices < 1:
        raise ConfigError(f"{where}.gather_devices must be at least 1, which divides nothing. Released: 8.")
    if train.group_size < 2:
        raise ConfigError(f"{where}.group_size must be at least 2: one positive and one negative.")
    if not train.lora.alpha or train.lora.dropout >= 1:
        raise ConfigError(
            f"{where}.lora.alpha must be above 0 and {where}.lora.dropout below 1: adapters would do nothing."
        )


def _check_turns(where: str, task: TaskTrain) -> None:
    if task.top_positives < 1 or (task.top_positives > 1 and task.positive != "teacher"):
        raise ConfigError(
            f"{where}.top_positives is {task.top_positives} and {where}.positive '{task.positive}', but only the "
            "positives of `teacher` go round, and there is at least one."
        )
    if task.bottom_negatives and task.negatives != "lowest":
        raise ConfigError(
            f"{where}.bottom_negatives is {task.bottom_negatives}, but {where}.negatives is '{task.negatives}': only "
            "those of `lowest` go round."
        )


def _check_without_rewards(where: str, task: TaskTrain) -> None:
    """Documents that a rule put last have no reward, and these losses need a number for each."""
    needs_numbers = {
        f"reward_form: {task.reward_form}": task.reward_form in ("zscore", "minmax"),
        "kl_direction: student_teacher": bool(task.kl_weight) and task.kl_direction == "student_teacher",
        "pairwise_weight": bool(task.pairwise_weight),
    }
    if found := [setting for setting, is_set in needs_numbers.items() if is_set]:
        raise ConfigError(
            f"{where}.score.same_task, same_label and num_first leave documents without a reward, with which "
            f"{where}.train.{found[0]} has no finite loss. Change it, or set reward_model.model, which scores every "
            "document."
        )


def _check_reward_model(settings: RewardModelConfig, runtime: RuntimeConfig) -> None:
    _check_train(settings.train, "reward_model.train", runtime)
    if settings.train.matryoshka_dimensions:
        raise ConfigError("reward_model.train.matryoshka_dimensions cut embeddings, and a cross-encoder has none.")
    if not settings.train.temperature:
        raise ConfigError("reward_model.train.temperature is 0, but logits are divided by it. Published: 1.")
    if settings.top_positives < 1 or settings.bottom_negatives < 1:
        raise ConfigError("reward_model.top_positives and bottom_negatives must be at least 1. Published: 3 and 16.")
    if settings.held_out_fraction >= 1:
        raise ConfigError("reward_model.held_out_fraction leaves no query to train on.")
