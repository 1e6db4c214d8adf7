"""The work of stages that ask LLMs: writing questions, canaries, feedback, and reading in evaluation."""

from dataclasses import replace

from llmr_ray.config import Config, LLMConfig, question_tasks
from llmr_ray.evaluation.annotators import stage_of
from llmr_ray.evaluation.protocols import applies
from llmr_ray.evaluation.tables import is_embedder
from llmr_ray.feedback.jobs import SHARD_QUERIES
from llmr_ray.feedback.planning import candidate_tokens, question_costs, upper_costs
from llmr_ray.labeling.canaries import label_tasks
from llmr_ray.labeling.questions import ANSWER_TOKENS, QUESTION_TOKENS
from llmr_ray.planning import counts
from llmr_ray.planning.hardware import Assumptions
from llmr_ray.planning.models import Size, size_of
from llmr_ray.planning.work import Work

_OPTIONS = 3
"""Options of a question that the reader compares, on average over tasks with and without them."""
_CHUNK_TOKENS = 256
"""A retrieved chunk of a long text with its continuation."""
_EVALUATE_QUERIES = 64
_REMEDY = "runtime.llm_gpus spreads the model; runtime.llm_kv_cache_gb takes what is not the model"


def generate(config: Config) -> list[Work]:
    """Questions about documents and the LLM's own answers to them, where the configuration wants any."""
    tasks, costs = question_tasks(config), question_costs(config)
    if not tasks:
        return []
    written = sum(cost.pairs * tasks[cost.task].per_document / (1 + tasks[cost.task].per_document) for cost in costs)
    calls = sum(cost.pairs for cost in costs)
    return [
        _asked(
            Work(stage="generate", unit="calls", units=calls, shards=counts.num_shards(calls, SHARD_QUERIES)),
            config,
            config.llm,
            tokens=float(sum(cost.tokens for cost in costs)),
            decoded=written * (QUESTION_TOKENS + ANSWER_TOKENS) / 2,
        )
    ]


def canary(config: Config) -> list[Work]:
    """Passages that try to talk the LLMs that label into a high score, each beside its plain self and the control."""
    if not (tasks := label_tasks(config)):
        return []
    units = 3 * config.labeling.num_canaries * len(tasks)
    return [
        _asked(
            Work(stage=stage_of("canary", name), unit="passages", units=units),
            config,
            llm,
            tokens=float(units * llm.max_model_tokens),
        )
        for name, llm in config.all_annotators.items()
    ]


def scored(config: Config, *, again: bool) -> list[Work]:
    """The feedback of each annotator, and what enough of them say."""
    if not config.labeling.asks_llm:
        return [Work(stage="score", unit="pairs", units=0)]
    found = [
        _scores(stage_of("score", name), replace(config, llm=llm), again=again)
        for name, llm in config.all_annotators.items()
    ]
    if len(found) > 1:
        pairs = found[0].units
        found.append(Work(stage="consensus", unit="pairs", units=pairs, storage_bytes=pairs * counts.ROW_BYTES))
    return found


def _scores(stage: str, config: Config, *, again: bool) -> Work:
    """Prompts and outputs by 2 N a token, sampled outputs one token after the other."""
    costs = upper_costs(config, again=again)
    asked = [data for data in config.datasets.values() if data.task in {cost.task for cost in costs}]
    decoded = 0.0
    for cost in costs:
        settings = config.tasks[cost.task].score
        if settings.feedback == "rank":
            queries = sum(data.num_train for data in asked if data.task == cost.task)
            drawn = queries + (cost.pairs if settings.samples == "fresh" else 0)
            decoded += settings.num_samples * settings.max_new_tokens / 2 * drawn
    pairs = sum(cost.pairs for cost in costs)
    work = Work(
        stage=stage,
        unit="pairs",
        units=pairs,
        storage_bytes=pairs * counts.ROW_BYTES * 2,
        shards=counts.num_shards(sum(data.num_train for data in asked), SHARD_QUERIES),
    )
    return _asked(work, config, config.llm, tokens=float(sum(cost.tokens for cost in costs)), decoded=decoded)


def evaluate(config: Config, assumed: Assumptions, number: int) -> Work:
    """Exact searches by all embedders so far, and the reader's answers, whose prompts what is retrieved fills.

    After the first round only the new embedder's prompts are unanswered: the store has those of the other methods.
    """
    methods, others = list(config.evaluate.methods), config.evaluate.embedders
    if "trained" in methods:
        methods += [f"round_{before}" for before in range(1, number)]
    searching = [others.get(method, config.embedder) for method in methods if is_embedder(method)]
    tested = [(data, counts.num_evaluated(config, data)) for data in config.datasets.values()]
    compared = counts.num_compared(config, assumed, tested)
    flops = sum(2.0 * size_of(embedder.model).dimension * compared for embedder in searching)
    opened = [
        counts.opened_bytes(config, assumed, embedder) / counts.num_index_nodes(config, assumed, embedder)
        for embedder in searching
    ]
    prompts, tokens, decoded = _prompts(config, assumed, methods if number == 1 else ["trained"])
    queries = sum(number for _, number in tested)
    work = Work(
        stage="evaluate",
        unit="prompts",
        units=prompts,
        node_bytes=max(opened, default=0),
        storage_bytes=queries * len(methods) * config.evaluate.search_depth * 40.0,
        shards=max(counts.num_shards(queries), counts.num_shards(prompts, _EVALUATE_QUERIES)),
        cpu_seconds=queries * len(methods) / 50,
    )
    asked = _asked(work, config, config.reader or config.llm, tokens=tokens, decoded=decoded)
    return asked.searching(flops, on_gpus=config.runtime.index_gpus > 0, assumed=assumed)


def _prompts(config: Config, assumed: Assumptions, methods: list[str]) -> tuple[int, float, float]:
    """The reader's prompts for some methods, their tokens, and the tokens that it says."""
    evaluate, llm = config.evaluate, config.reader or config.llm
    read = candidate_tokens(llm) * assumed.fill
    prompts, tokens, decoded = 0, 0.0, 0.0
    for name, count in evaluate.num_llm_queries.items():
        if name not in config.datasets:
            continue
        task = config.datasets[name].task
        asked = min(count, counts.num_evaluated(config, config.datasets[name])) * sum(
            method in evaluate.methods and applies(method, task) for method in methods
        )
        length = read
        if task == "qa":
            length += evaluate.qa_passages * (evaluate.qa_passage_tokens or read)
            decoded += asked * evaluate.qa_max_new_tokens / 2
        elif task == "icl":
            length += evaluate.icl_demonstrations * (evaluate.icl_demonstration_tokens or read) + _OPTIONS * 8
            decoded += asked * evaluate.icl_max_new_tokens / 4
        elif task == "chat":
            length += evaluate.chat_turns * read
        elif task == "lrlm":
            length += evaluate.lrlm_window_tokens + evaluate.lrlm_chunks * _CHUNK_TOKENS
        prompts += asked
        tokens += asked * min(length, llm.max_model_tokens, evaluate.prompt_tokens.get(task, llm.max_model_tokens))
    return prompts, tokens, decoded


def _asked(work: Work, config: Config, llm: LLMConfig, *, tokens: float, decoded: float = 0.0) -> Work:
    """The work with an LLM that reads and says so many tokens."""
    size, gpus = size_of(llm.model), max(1, round(config.runtime.llm_gpus))
    return replace(
        work,
        tokens=tokens,
        flops=2 * size.body * tokens,
        decoded=decoded,
        weights=size.parameters,
        memory_bytes=_weight_bytes(size, llm) / gpus + config.runtime.llm_kv_cache_gb * 2**30,
        gpus=gpus,
        remedy=_REMEDY,
    )


def _weight_bytes(size: Size, llm: LLMConfig) -> float:
    return (4 if llm.dtype == "float32" else 2) * size.parameters
