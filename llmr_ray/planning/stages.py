"""The work of each stage of a configuration: tokens, FLOPs, memory and storage (methods K; 2 N and 6 N per token).

A forward pass takes 2 N FLOPs a token, N the parameters of the body, and a training step three times that; attention
over short texts comes to a few percent and is left out. From the configuration alone every figure is an upper bound or
rests on the assumed mean length of texts; the feedback's pairs are exact once candidates are mined (`llmr plan`).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from llmr_ray.artifacts import SHARD_ROWS
from llmr_ray.config import Config, TrainConfig
from llmr_ray.evaluation.leakage import EXAMPLE_TASKS
from llmr_ray.feedback.jobs import SHARD_QUERIES
from llmr_ray.feedback.planning import upper_costs
from llmr_ray.planning.hardware import GPU, Assumptions, seconds
from llmr_ray.planning.models import Size, size_of

_CHARS_PER_TOKEN = 4.5
_OPTIONS = 3
"""Options of a question that the reader compares, on average over tasks with and without them."""
_ADAM_BYTES = 16
"""Per parameter in training: weights, gradient and two moments, float32."""
_ACTIVATION_BYTES = 34 * 12
"""Per token and dimension: 34 bytes a layer in half precision without attention matrices (2205.05198), 12 layers."""
_COMPARED_PER_SECOND = 1800
"""Texts that a core looks up among the test queries (measured: 12,578 in 7 s)."""
_SCORE_BYTES = 120
"""Of a row of llm_scores or candidates on disk."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage's work, independent of where it runs.

    units, unit: how much of what. tokens: that go through a model. flops, bytes_read, decoded: as hardware.seconds
    takes them. weights: parameters that each worker loads. memory_bytes: of a worker's GPU, or of a node where no GPU
    works. storage_bytes: what the stage leaves. shards: pieces that workers share; the unit of retry. cpu_seconds: of
    work on cores. steps, gradient_bytes, batch: of a training. gpus: of each worker.
    """

    stage: str
    unit: str
    units: float
    tokens: float = 0
    flops: float = 0
    bytes_read: float = 0
    decoded: float = 0
    weights: float = 0
    memory_bytes: float = 0
    storage_bytes: float = 0
    shards: int = 1
    cpu_seconds: float = 0
    steps: int = 0
    gradient_bytes: float = 0
    batch: int = 0
    gpus: int = 1

    def gpu_hours(self, gpu: GPU, assumed: Assumptions) -> float:
        """On one GPU of a kind, without what does not divide."""
        of = {"flops": self.flops, "bytes_read": self.bytes_read, "decoded": self.decoded, "weights": self.weights}
        return seconds(gpu, assumed, **of) / 3600


def plan(config: Config, assumed: Assumptions) -> list[Work]:
    """The work of all stages in their order, rounds one after the other."""
    embedder, llm = size_of(config.embedder.model), size_of(config.llm.model)
    queries, documents = num_queries(config), num_documents(config, assumed)
    found = [_prepare(config, assumed, queries, documents), *_embedded("base", config, assumed, queries, documents)]
    found.append(_leakage(config, assumed))
    for number in range(1, config.rounds + 1):
        told = f"_{number}" if number < config.rounds else ""
        part = [_mine(config, documents, embedder), *_scored(config, llm, again=number > 1)]
        part += _taught(config, assumed, number)
        part += [_group(config, assumed), _train(config, assumed, embedder)]
        part += _embedded("trained", config, assumed, queries, documents)
        part.append(_evaluate(config, assumed))
        found += [replace(work, stage=work.stage + told) for work in part]
    return found


def num_queries(config: Config) -> int:
    """Queries of all splits, at the most."""
    return sum(data.num_train + data.num_dev + data.num_test for data in config.datasets.values())


def num_documents(config: Config, assumed: Assumptions, tasks: Collection[str] = ()) -> int:
    """Documents of the pools of some tasks, or of all; where the configuration does not say, assumed or as many as its
    queries' candidates."""
    total = 0
    for data in config.datasets.values():
        if tasks and data.task not in tasks:
            continue
        asked = data.num_train + data.num_dev + data.num_test
        own_pools = data.task in ("chat", "lrlm")
        mined = max(1, _mined(config, data.task, again=False))
        guess = asked * mined if own_pools else (assumed.documents or asked * mined)
        if data.task in EXAMPLE_TASKS and not data.num_train:
            # Examples are made of training rows: one that only tests takes those of the others.
            guess = 0
        total += data.num_documents or guess
    return total


def num_index_shards(config: Config, assumed: Assumptions) -> int:
    """Nodes that an exact index takes, each with so much memory for it."""
    size = num_documents(config, assumed) * _vector_bytes(config)
    return max(1, -(-int(size) // int(assumed.node_memory_gb * 1e9)))


def _mined(config: Config, task: str, *, again: bool) -> int:
    return config.tasks[task].mine_in(again=again).most


def _pairs(config: Config) -> int:
    return sum(data.num_train * _mined(config, data.task, again=False) for data in config.datasets.values())


def _vector_bytes(config: Config) -> int:
    return 4 * size_of(config.embedder.model).dimension


def _lengths(config: Config, assumed: Assumptions) -> tuple[float, float]:
    """Mean tokens of a query and of a document."""
    return assumed.fill * config.embedder.max_query_tokens, assumed.fill * config.embedder.max_document_tokens


def _shards(rows: float) -> int:
    return max(1, -(-int(rows) // SHARD_ROWS))


def _prepare(config: Config, assumed: Assumptions, queries: int, documents: int) -> Work:
    _, length = _lengths(config, assumed)
    return Work(
        stage="prepare",
        unit="documents",
        units=documents,
        storage_bytes=(documents + queries) * length * _CHARS_PER_TOKEN,
        shards=len({data.task for data in config.datasets.values()}),
        cpu_seconds=(documents + queries) / assumed.documents_per_core,
    )


def _embedded(which: str, config: Config, assumed: Assumptions, queries: int, documents: int) -> list[Work]:
    """Encoding and indexing by one embedder."""
    size, (query, document) = size_of(config.embedder.model), _lengths(config, assumed)
    tokens = queries * query + documents * document
    vectors = float(queries + documents) * _vector_bytes(config)
    embed = Work(
        stage=f"embed_{which}",
        unit="texts",
        units=queries + documents,
        tokens=tokens,
        flops=2 * size.body * tokens,
        weights=size.parameters,
        memory_bytes=4 * size.parameters + config.runtime.encode_batch_tokens * size.dimension * 100,
        storage_bytes=vectors,
        shards=_shards(documents) + _shards(queries),
    )
    index = Work(
        stage=f"index_{which}",
        unit="documents",
        units=documents,
        memory_bytes=documents * _vector_bytes(config) / num_index_shards(config, assumed),
        storage_bytes=float(documents) * _vector_bytes(config),
        shards=max(num_index_shards(config, assumed), config.runtime.index_shards),
        cpu_seconds=vectors / 5e8,
    )
    return [embed, index]


def _leakage(config: Config, assumed: Assumptions) -> Work:
    """Every training query, and every example, against all test queries."""
    trained = sum(data.num_train for data in config.datasets.values())
    texts = trained + num_documents(config, assumed, EXAMPLE_TASKS)
    return Work(
        stage="leakage",
        unit="texts",
        units=texts,
        shards=_shards(texts),
        cpu_seconds=texts / _COMPARED_PER_SECOND,
    )


def _mine(config: Config, documents: int, size: Size) -> Work:
    """Exact search: every query against the whole of its pool; chat and texts have pools of their own."""
    train = [data for data in config.datasets.values() if data.num_train]
    shared = [data for data in train if data.task not in ("chat", "lrlm")]
    compared = float(sum(data.num_train * (data.num_documents or documents) for data in shared))
    queries = sum(data.num_train for data in train)
    return Work(
        stage="mine",
        unit="queries",
        units=queries,
        flops=2.0 * size.dimension * compared,
        memory_bytes=documents * 4.0 * size.dimension,
        storage_bytes=_pairs(config) * _SCORE_BYTES,
        shards=_shards(queries),
        cpu_seconds=queries / 50,
    )


def _scored(config: Config, llm: Size, *, again: bool) -> list[Work]:
    """The LLM's feedback: prompts and outputs by 2 N a token, sampled outputs one token after the other."""
    costs = upper_costs(config, again=again)
    if not costs:
        return []
    decoded = 0.0
    for cost in costs:
        settings = config.tasks[cost.task].score
        if settings.feedback == "rank":
            each = settings.num_samples * settings.max_new_tokens / 2
            queries = sum(data.num_train for data in config.datasets.values() if data.task == cost.task)
            decoded += each * (queries + (cost.pairs if settings.samples == "fresh" else 0))
    tokens, pairs = float(sum(cost.tokens for cost in costs)), sum(cost.pairs for cost in costs)
    queries = sum(data.num_train for data in config.datasets.values() if data.task in {cost.task for cost in costs})
    number = 1 + len(config.annotators)
    return [
        Work(
            stage="score",
            unit="pairs",
            units=pairs * number,
            tokens=tokens * number,
            flops=2 * llm.body * tokens * number,
            decoded=decoded * number,
            weights=llm.parameters,
            memory_bytes=(4 if config.llm.dtype == "float32" else 2) * llm.parameters
            + config.runtime.llm_kv_cache_gb * 2**30,
            storage_bytes=pairs * number * _SCORE_BYTES * 2,
            shards=max(1, -(-queries // SHARD_QUERIES)),
            gpus=max(1, round(config.runtime.llm_gpus)),
        )
    ]


def _taught(config: Config, assumed: Assumptions, number: int) -> list[Work]:
    """The reward model's training and its scores of all candidates."""
    settings = config.reward_model
    if not settings.model:
        return []
    size = size_of(settings.model)
    length = assumed.fill * settings.max_tokens
    per_query = settings.train.group_size * length
    pairs = _pairs(config)
    train = _trained("reward_model", settings.train, size, per_query, config)
    teach = Work(
        stage="teach",
        unit="pairs",
        units=pairs,
        tokens=pairs * length,
        flops=2 * size.body * pairs * length,
        weights=size.parameters,
        memory_bytes=4 * size.parameters,
        storage_bytes=pairs * _SCORE_BYTES,
        shards=_shards(pairs),
    )
    return [train, teach]


def _group(config: Config, assumed: Assumptions) -> Work:
    pairs, (_, length) = _pairs(config), _lengths(config, assumed)
    queries = sum(data.num_train for data in config.datasets.values())
    return Work(
        stage="group",
        unit="queries",
        units=queries,
        storage_bytes=pairs * length * _CHARS_PER_TOKEN,
        shards=1,
        cpu_seconds=pairs / (10 * assumed.documents_per_core),
    )


def _train(config: Config, assumed: Assumptions, size: Size) -> Work:
    query, document = _lengths(config, assumed)
    return _trained("train", config.train, size, query + config.train.group_size * document, config)


def _trained(stage: str, train: TrainConfig, size: Size, per_query: float, config: Config) -> Work:
    tokens = float(train.num_steps) * train.global_batch_size * per_query
    again = 1 + (config.runtime.train_checkpointing or config.runtime.train_grad_cache) / 3
    workers = max(1, config.runtime.train_workers)
    on_worker = train.global_batch_size / workers * per_query
    kept = on_worker * size.dimension * (_ACTIVATION_BYTES / (12 if config.runtime.train_checkpointing else 1))
    return Work(
        stage=stage,
        unit="steps",
        units=train.num_steps,
        tokens=tokens,
        flops=6 * size.body * tokens * again,
        weights=size.parameters,
        memory_bytes=_ADAM_BYTES * size.parameters + kept,
        # Two checkpoints with both moments, and the model.
        storage_bytes=(2 * 12 + 4) * size.parameters,
        steps=train.num_steps,
        gradient_bytes=4 * size.parameters,
        batch=train.global_batch_size,
    )


def _evaluate(config: Config, assumed: Assumptions) -> Work:
    """The reader's answers for all methods; passages of what is retrieved fill its prompt."""
    evaluate, llm = config.evaluate, size_of((config.reader or config.llm).model)
    tokens = decoded = 0.0
    prompts = 0
    for name, count in evaluate.num_llm_queries.items():
        if name not in config.datasets:
            continue
        task = config.datasets[name].task
        asked = count * len(evaluate.methods)
        length: float = config.llm.max_candidate_tokens * assumed.fill
        if task == "qa":
            length += evaluate.qa_passages * evaluate.qa_passage_tokens
            decoded += asked * evaluate.qa_max_new_tokens / 2
        elif task == "icl":
            shown = evaluate.icl_demonstration_tokens or config.llm.max_candidate_tokens * assumed.fill
            length += evaluate.icl_demonstrations * shown + _OPTIONS * 8
            decoded += asked * evaluate.icl_max_new_tokens / 4
        elif task == "lrlm":
            length += evaluate.lrlm_window_tokens + evaluate.lrlm_chunks * 256
        prompts += asked
        tokens += asked * min(length, config.llm.max_model_tokens)
    queries = sum(data.num_test for data in config.datasets.values())
    return Work(
        stage="evaluate",
        unit="prompts",
        units=prompts,
        tokens=tokens,
        flops=2 * llm.body * tokens,
        decoded=decoded,
        weights=llm.parameters,
        memory_bytes=2 * llm.parameters + config.runtime.llm_kv_cache_gb * 2**30,
        storage_bytes=queries * len(evaluate.methods) * evaluate.search_depth * 40.0,
        shards=max(_shards(queries), -(-prompts // 64)),
        cpu_seconds=queries * len(evaluate.methods) / 50,
        gpus=max(1, round(config.runtime.llm_gpus)),
    )
