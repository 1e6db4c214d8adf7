"""The work of each stage of a configuration: tokens, FLOPs, memory and storage (methods K; 2 N and 6 N per token).

A forward pass takes 2 N FLOPs a token, N the parameters of the body, and a training step three times that; attention
over short texts comes to a few percent and is left out. From the configuration alone every figure is an upper bound or
rests on the assumed mean length of texts; the feedback's pairs are exact once candidates are mined (`llmr plan`).
"""

from dataclasses import replace

from llmr_ray.config import Config, EmbedderConfig, TrainConfig
from llmr_ray.evaluation.leakage import POOL_TASKS
from llmr_ray.evaluation.leakage_stage import SHARD_ROWS as LEAKAGE_SHARD_ROWS
from llmr_ray.mining.stage import MINE_QUERIES
from llmr_ray.planning import asking, counts
from llmr_ray.planning.hardware import Assumptions
from llmr_ray.planning.models import Size, size_of
from llmr_ray.planning.work import Work
from llmr_ray.stages import in_round
from llmr_ray.training.step import PACK_TOKENS

_ADAM_BYTES = 16
"""Per parameter in training: weights, gradient and two moments, float32."""
_LAYERS = 12
_ACTIVATION_BYTES = 34 * _LAYERS
"""Per token and dimension: 34 bytes a layer in half precision without attention matrices (2205.05198)."""
_COMPARED_PER_SECOND = 1800
"""Texts that a core looks up among the test queries (measured: 12,578 in 7 s)."""
_ENCODE_REMEDY = "runtime.encode_batch_tokens makes batches smaller"
_TRAIN_REMEDY = (
    "more runtime.train_workers share the batch; runtime.train_grad_cache and train_checkpointing keep less of it"
)


def plan(config: Config, assumed: Assumptions) -> list[Work]:
    """The work of all stages in their order, rounds one after the other, named as in stages.StagePlan."""
    found = [_prepare(config, assumed), *asking.generate(config)]
    found += _embedded("base", config.embedder, config, assumed)
    for name, embedder in config.evaluate.embedders.items():
        if name in config.evaluate.methods:
            found += _embedded(name, embedder, config, assumed)
    found += [_leakage(config, assumed), *asking.canary(config)]
    for number in range(1, config.rounds + 1):
        part = [*_fed_back(config, assumed, again=number > 1), _train(config, assumed)]
        part += _embedded("trained", config.embedder, config, assumed)
        part.append(asking.evaluate(config, assumed, number))
        found += [replace(work, stage=in_round(work.stage, number, config.rounds)) for work in part]
    return found


def _prepare(config: Config, assumed: Assumptions) -> Work:
    documents = counts.num_documents(config, assumed)
    texts, (_, length) = documents + counts.num_queries(config), counts.lengths(config.embedder, assumed)
    return Work(
        stage="prepare",
        unit="documents",
        units=documents,
        storage_bytes=texts * length * counts.CHARS_PER_TOKEN,
        shards=len({data.task for data in config.datasets.values()}),
        cpu_seconds=texts / assumed.documents_per_core,
    )


def _embedded(which: str, embedder: EmbedderConfig, config: Config, assumed: Assumptions) -> list[Work]:
    """Encoding and indexing by one embedder."""
    queries, documents = counts.num_queries(config), counts.num_documents(config, assumed)
    size, (query, document) = size_of(embedder.model), counts.lengths(embedder, assumed)
    tokens = queries * query + documents * document
    vector_bytes = counts.vector_bytes(embedder)
    index_shards = max(1, config.runtime.index_shards)
    embed = Work(
        stage=f"embed_{which}",
        unit="texts",
        units=queries + documents,
        tokens=tokens,
        flops=2 * size.body * tokens,
        weights=size.parameters,
        memory_bytes=4 * size.parameters + config.runtime.encode_batch_tokens * size.dimension * 100,
        storage_bytes=float(queries + documents) * vector_bytes,
        shards=counts.num_shards(documents) + counts.num_shards(queries),
        remedy=_ENCODE_REMEDY,
    )
    index = Work(
        stage=f"index_{which}",
        unit="documents",
        units=documents,
        node_bytes=documents * vector_bytes / index_shards,
        storage_bytes=float(documents) * vector_bytes,
        shards=index_shards,
        cpu_seconds=float(queries + documents) * vector_bytes / 5e8,
    )
    return [embed, index]


def _leakage(config: Config, assumed: Assumptions) -> Work:
    """Every training query, and every document of a shared pool, against all test queries."""
    texts = counts.num_training(config) + counts.num_documents(config, assumed, POOL_TASKS)
    return Work(
        stage="leakage",
        unit="texts",
        units=texts,
        shards=counts.num_shards(texts, LEAKAGE_SHARD_ROWS),
        cpu_seconds=texts / _COMPARED_PER_SECOND,
    )


def _fed_back(config: Config, assumed: Assumptions, *, again: bool) -> list[Work]:
    """From candidates by way of feedback to groups."""
    pairs = counts.num_pairs(config, again=again)
    found = [_mine(config, assumed, pairs, again=again)]
    if config.labeling.enabled:
        found.append(_rows("select", "pairs", pairs, assumed))
        asked = asking.scored(config, again=again)
        return [*found, *asked, _rows("label", "pairs", pairs, assumed), _group(config, assumed, pairs)]
    found += [*asking.scored(config, again=again), _rows("reward", "pairs", pairs, assumed)]
    if config.reward_model.model:
        found += _taught(config, assumed, pairs)
    return [*found, _group(config, assumed, pairs)]


def _mine(config: Config, assumed: Assumptions, pairs: int, *, again: bool) -> Work:
    """Exact search of the tasks that mine by embeddings. Every worker maps the whole index, a node only once."""
    train = [data for data in config.datasets.values() if data.num_train]
    dense = [(data, data.num_train) for data in train if config.tasks[data.task].mine_in(again=again).num_dense]
    compared = counts.num_compared(config, assumed, dense)
    queries = counts.num_training(config)
    work = Work(
        stage="mine",
        unit="queries",
        units=queries,
        node_bytes=counts.opened_bytes(config, assumed, config.embedder),
        storage_bytes=pairs * counts.ROW_BYTES,
        shards=counts.num_shards(queries, MINE_QUERIES),
        cpu_seconds=queries / 50,
    )
    flops = 2.0 * size_of(config.embedder.model).dimension * compared
    return work.searching(flops, on_gpus=config.runtime.index_gpus > 0, assumed=assumed)


def _taught(config: Config, assumed: Assumptions, pairs: int) -> list[Work]:
    """The reward model's training, its scores of all candidates, and how far it agrees with the LLM."""
    settings = config.reward_model
    size, length = size_of(settings.model), assumed.fill * settings.max_tokens
    teach = Work(
        stage="teach",
        unit="pairs",
        units=pairs,
        tokens=pairs * length,
        flops=2 * size.body * pairs * length,
        weights=size.parameters,
        memory_bytes=4 * size.parameters,
        storage_bytes=pairs * counts.ROW_BYTES,
        shards=counts.num_shards(counts.num_training(config), MINE_QUERIES),
    )
    train = _trained("reward_model", settings.train, size, settings.train.group_size * length, config)
    held_out = int(pairs * settings.held_out_fraction)
    return [train, teach, _rows("agree", "pairs", held_out, assumed)]


def _rows(stage: str, unit: str, rows: int, assumed: Assumptions) -> Work:
    """A stage that reads and writes rows, on one core."""
    seconds = rows / (10 * assumed.documents_per_core)
    return Work(stage=stage, unit=unit, units=rows, storage_bytes=rows * counts.ROW_BYTES, cpu_seconds=seconds)


def _group(config: Config, assumed: Assumptions, pairs: int) -> Work:
    _, length = counts.lengths(config.embedder, assumed)
    written = _rows("group", "queries", pairs, assumed)
    storage = pairs * length * counts.CHARS_PER_TOKEN
    return replace(written, units=counts.num_training(config), storage_bytes=storage)


def _train(config: Config, assumed: Assumptions) -> Work:
    query, document = counts.lengths(config.embedder, assumed)
    per_query = query + config.train.group_size * document
    return _trained("train", config.train, size_of(config.embedder.model), per_query, config)


def _trained(stage: str, train: TrainConfig, size: Size, per_query: float, config: Config) -> Work:
    runtime = config.runtime
    tokens = float(train.num_steps) * train.global_batch_size * per_query
    again = 1 + (runtime.train_checkpointing or runtime.train_grad_cache) / 3
    held = train.global_batch_size / max(1, runtime.train_workers) * per_query
    if runtime.train_grad_cache:
        held = min(held, PACK_TOKENS["cuda"])
    kept = held * size.dimension * (_ACTIVATION_BYTES / (_LAYERS if runtime.train_checkpointing else 1))
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
        remedy=_TRAIN_REMEDY,
    )
