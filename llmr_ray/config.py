"""The configuration: frozen dataclasses, one per part, with defaults. loading.py reads them from YAML and checks them.

Everything outside `runtime`, `budget`, `serving` and `report` is identity: it changes numbers and is hashed into
artifact ids. These change only speed, place and what is shown, and never are. This module stays light: it imports
neither torch, ray nor vllm.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from llmr_ray.index.settings import IndexConfig as IndexConfig
from llmr_ray.labeling.settings import AdaptiveConfig
from llmr_ray.labeling.settings import TaskQuestions as TaskQuestions
from llmr_ray.later import later
from llmr_ray.runtime_config import BudgetConfig as BudgetConfig
from llmr_ray.runtime_config import ReportConfig as ReportConfig
from llmr_ray.runtime_config import RuntimeConfig as RuntimeConfig
from llmr_ray.serving.settings import ServingSettings
from llmr_ray.task_config import TaskConfig as TaskConfig
from llmr_ray.task_config import TaskGroup as TaskGroup
from llmr_ray.task_config import TaskMine as TaskMine
from llmr_ray.task_config import TaskScore as TaskScore
from llmr_ray.task_config import TaskTrain as TaskTrain


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One data set: where it comes from and how much of it is used."""

    task: str = "qa"
    """The task whose instructions, reward and losses apply: qa, convsearch, chat, lrlm, icl or tool."""
    source: str = "jsonl"
    """The reader in data/sources.py."""
    path: str = ""
    """An asset's name (llmr_ray/assets.py) or a local path."""
    num_train: int = 0
    """Training queries at the most, the lowest by a hash of the query id. 0: evaluation only."""
    num_dev: int = 0
    """Development queries at the most."""
    num_test: int = 0
    """Test queries at the most."""
    num_documents: int = 0
    """Documents of a shared pool at the least (gold documents first, then fill). Where every dialogue or text is a pool
    of its own, queries that could see more than these are left out. 0: all."""
    max_text_chars: int = 20_000
    """Longer texts are quarantined, not cut: a 1 MB passage is a defect of the data."""
    candidates: str = later("")
    """A file of candidates beside the others, see mine.num_given. llm_r: for example bm25_train.jsonl.gz; jsonl and
    mteb: a TREC run. The other sources have theirs in the rows."""
    given_rewards: list[str] = field(default_factory=list, metadata={"later": True})
    """llm_r: files of candidates whose scores are a teacher's, for example kd_bm25_train.jsonl.gz and
    kd_it2_train.jsonl.gz. They are given candidates (mine.num_given), and rewards with score.feedback: given."""
    pool: str = later("")
    """Passages and APIs: the pool that the data set's documents join and its queries search, as do those of every other
    data set that names it. Empty: a pool of its own."""
    window_tokens: int = later(256)
    """Long texts: the recent text that the LLM always sees, so that nothing of it is retrieved. In whole chunks of 128.
    Published: 2048."""
    window_end: str = later("output")
    """Where the window ends: where the desired output begins (output: the window is as long for each), or with the text
    (text, as published): the desired outputs lie in it, and each sees what is before it; of a text of more than 160,000
    characters the first are used, else the last."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How queries are split. A query's split is a pure function of its id."""

    test_fraction: float = 0.3
    """Share of ids whose hash falls into the test split."""
    dev_fraction: float = 0.1
    """Share of ids whose hash falls into the development split."""
    max_bad_fraction: float = 0.05
    """Quarantined rows above this share of a data set fail the stage."""


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """The base embedder: any BERT-like, T5 or sentence-transformers model (methods.md A.2)."""

    model: str = "minilm-l6"
    """An asset's name, a local folder or a hub name."""
    pooling: str = "auto"
    """auto (what the folder says; mean otherwise), cls, mean or last; of one that is only compared also decoder: what a
    T5's decoder makes of the text in its first step (AAR, methods.md D)."""
    similarity: str = later("cosine")
    """cosine: embeddings have unit norm. dot: they keep their length, which counts (Contriever, AAR, RetroMAE),
    whatever the model's folder says; train.temperature then divides inner products (AAR: 1)."""
    pool_instruction: bool = later(True)
    """False: an instruction's tokens are read and not pooled (Instructor). As LLM-Embedder ran it, they are pooled."""
    max_query_tokens: int = 64
    """Longer queries are cut on the right. Published: 256."""
    max_document_tokens: int = 64
    """Longer documents are cut on the right. Published: 256."""
    precision: str = "auto"
    """float32, bfloat16, or auto: bfloat16 where the hardware multiplies it natively, else float32. The resolved value
    is identity. int8: linear layers in 8 bits, for CPUs that multiply these fast and bfloat16 slowly; trained as auto
    says. A model that loses too much by it is refused."""


@dataclass(frozen=True, kw_only=True)
class ComparedEmbedder(EmbedderConfig):
    """An embedder that is only evaluated, with instructions of its own. A task without an entry has none."""

    query_instructions: dict[str, str] = field(default_factory=dict)
    """Task -> what is put before a query."""
    document_instructions: dict[str, str] = field(default_factory=dict)
    """Task -> what is put before a document."""


LLM = "llm"
"""The annotator that every run with feedback has; those beside it have names of their own."""

ENDPOINTS = ("openai", "openai_chat")
"""Values of `engine` that name a service."""


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The language model whose feedback trains the embedder and that reads what is retrieved."""

    model: str = "smollm2-135m-instruct"
    """An asset's name, a local folder or a hub name."""
    engine: str = "vllm"
    """vllm, transformers (the slow reference), openai (the completions of an OpenAI-compatible endpoint; `model` names
    the folder or hub name of its tokenizer), or openai_chat (its chats: outputs alone, no likelihood; `model` names a
    tokenizer by which prompts are cut)."""
    endpoint: str = ""
    """Endpoints only: base URL, for example http://localhost:8000/v1. The key is read from OPENAI_API_KEY."""
    endpoint_model: str = ""
    """Endpoints only: the model's name there."""
    dtype: str = "float32"
    """float32, bfloat16, or auto: bfloat16 where this machine multiplies it natively, three times as fast."""
    max_model_tokens: int = 1024
    """Prompt and output together. Longer prompts lose candidate text first, never the desired output."""
    max_candidate_tokens: int = 512
    """A candidate is cut to this many LLM tokens before it enters a prompt (methods.md A.4.2)."""
    chat_template: bool = False
    """Ask in the model's own chat template: the prompt is the user's turn, the output the assistant's. Running text
    (lrlm) is continued without it. Off as in LLM-Embedder's code."""


@dataclass(frozen=True, kw_only=True)
class BM25Config:
    """BM25 as in the released evaluator (methods.md A.3)."""

    k1: float = 0.82
    b: float = 0.68


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (2106.09685): where a large embedder cannot be trained whole. Merged into it in the end."""

    rank: int = 0
    """Of the adapters, the only weights that train; they want a higher learning_rate, about 1e-4. 0: train them all."""
    alpha: int = 32
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """On the adapters' input, while train.dropout is on."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Linear layers that get adapters, by the end of their names (q_proj, v_proj); all-linear: every one."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation (methods.md A.6)."""

    num_steps: int = 100
    """Optimiser steps."""
    global_batch_size: int = 32
    """Queries of a step over all workers; each worker takes an equal slice."""
    group_size: int = 4
    """Documents per query in a step: one positive and the rest negatives (G)."""
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup_fraction: float = 0.2
    schedule: str = "linear"
    """linear decay to 0, or constant, after a linear warm-up."""
    temperature: float = 0.02
    """Divides similarities (or a cross-encoder's logits) in every loss. Published: 0.01."""
    matryoshka_dimensions: list[int] = field(default_factory=list)
    """The loss is the mean over embeddings cut to these sizes, beside the whole one (2205.13147); none: the whole."""
    max_grad_norm: float = 1.0
    """0: no clipping."""
    batching: str = "homogeneous"
    """homogeneous (one data set or task per batch), heterogeneous (batch_shares of them, in equal parts) or mixed."""
    batch_shares: int = 2
    """heterogeneous: parts of a batch; with as many workers each has one data set."""
    batch_by: str = "dataset"
    """homogeneous and heterogeneous: dataset (as published) or task."""
    mix: str = "proportional"
    """homogeneous and heterogeneous, the share of each in the steps: proportional (one pass over everything per epoch),
    temperature, or round_robin (equal)."""
    mix_temperature: float = 1.0
    """temperature: blocks ** (1 / T); 1 is proportional, more favours the small."""
    self_paced: bool = True
    """lr = schedule * sqrt(L / L0) per task (A.6.2)."""
    self_paced_interval: int = 25
    """Steps between refreshes of L0. Published: 1000."""
    checkpoint_interval: int = 25
    """Steps between checkpoints; a failure costs at most this many."""
    dropout: bool = True
    """False: dropout off, so that runs with different worker counts can be compared exactly."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int | None = later(None)
    """Of training alone: which documents a group holds, the order of batches, dropout. Another one changes nothing that
    the LLM is asked. None: that of the run."""
    instructions: bool = later(True)
    """False: the embedder is trained, and then embeds, without the tasks' instructions; mining by the base embedder
    keeps them, so that the LLM is asked about the same candidates. For study."""
    order: str = later("shuffled")
    """homogeneous: batches of an epoch shuffled, or sequential: one source after the other, by name. For study."""
    self_paced_by: str = later("task")
    """What has a loss of its own in self_paced: task (as published) or dataset."""
    sampling: str = later("each_epoch")
    """The documents of a group: drawn each_epoch, or once, as LLM-Embedder's released code does (A.5.1)."""
    false_negatives: str = later("masked")
    """masked, or kept: documents of the batch with a text of the query's own group, or gold for it, are its negatives,
    as in LLM-Embedder's released code, where even a document that a group repeats is its own negative (I.7)."""
    gather_devices: int = later(1)
    """Losses over gathered documents are divided by this. LLM-Embedder's released code gathers without gradient, so on
    its 8 GPUs they have an eighth of the gradient that they should have beside the group KL, which is not gathered
    (I.6)."""


def _reward_model_training() -> TrainConfig:
    return TrainConfig(
        global_batch_size=16,
        group_size=8,
        learning_rate=1e-5,
        warmup_fraction=0.13,
        temperature=1.0,
        batching="mixed",
        self_paced=False,
    )


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A cross-encoder between the LLM and the embedder: it learns to rank candidates as the LLM does (LLM-R, B.6)."""

    model: str = ""
    """An asset's name, a local folder or a hub name. Published: ELECTRA-base. Empty: none, the LLM's scores are the
    rewards."""
    sees_target: bool = True
    """It reads the desired output behind the query, as no retriever could. False: for study."""
    max_tokens: int = 384
    """Of query, desired output and candidate together; the longer side is cut first."""
    precision: str = "auto"
    """float32, bfloat16 or auto, as the embedder's."""
    top_positives: int = 3
    """The positive is one of so many candidates that the LLM likes best, in turn by epoch."""
    bottom_negatives: int = 16
    """Negatives are taken from so many that it likes least, in turn by epoch."""
    held_out_fraction: float = 0.05
    """Share of the training queries that do not train it, by a hash of the id: on them it can be compared with the
    LLM."""
    train: TrainConfig = field(default_factory=_reward_model_training)
    """Its optimisation. Published: 3000 steps, the first 400 warm-up, of 128 queries with 1 positive and 7 negatives
    each, learning rate 1e-5, no temperature."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation in small (methods.md A.7)."""

    methods: list[str] = field(default_factory=lambda: ["none", "random", "bm25", "recency", "base", "trained"])
    """Of these, of kmeans (examples), and of the names in `embedders`."""
    embedders: dict[str, ComparedEmbedder] = field(default_factory=dict, metadata={"later": True})
    """Other embedders to compare with, by the name that the tables give them."""
    split: str = later("test")
    """Whose queries are evaluated: test, or dev for what must not be chosen on test queries (how many rounds, which
    learning rate); data sets without num_dev are left out then."""
    num_llm_queries: dict[str, int] = field(default_factory=dict)
    """Queries per data set that the LLM answers; the lowest by a hash of the id. Absent: 0."""
    qa_passages: int = 3
    qa_passage_tokens: int = 96
    """A passage is cut to this many LLM tokens in the reader's prompt. 0, as published: only where that is too long."""
    qa_max_new_tokens: int = 16
    """Of an answer under the protocol ours."""
    qa_protocols: dict[str, str] = field(default_factory=dict, metadata={"later": True})
    """How the data sets of qa are asked: ours (made-up demonstrations; of options the likeliest is chosen), or as
    LLM-Embedder asks them (A.7): mmlu (letters of options, by subject), popqa (a demonstration of each other relation)
    or nq (demonstrations of the development split). Absent: ours."""
    reading: str = later("passages")
    """qa, how the LLM reads what is retrieved: passages (all before the question, best first), evidence (it labels them
    first; those below score_floor go, the rest stand under its quotes, best last), or vote (one by one; the answers
    are voted by retrieval score; questions with options are read with all passages) (methods.md C.5)."""
    score_floor: float = later(0.5)
    """evidence only: passages that the LLM labels lower are not read, except the first where all would go."""
    icl_demonstrations: int = 4
    """Published: 8."""
    icl_demonstration_tokens: int = 96
    """A demonstration is cut to this many LLM tokens in any case. 0: only where the prompt is too long."""
    icl_max_new_tokens: int = 16
    """Published: 64."""
    answer_match: str = later("exact")
    """qa, what counts as EM: exact, or alias_inside: an accepted answer that stands anywhere in the output, as it is,
    in lower case or capitalised, as LLM-Embedder's released code counts PopQA (I.20)."""
    icl_cut: str = later("least_similar")
    """Which demonstrations a prompt that is too long loses first: least_similar, or most_similar, as LLM-Embedder's
    released code (I.21)."""
    icl_option_space: bool = later(False)
    """A space stands before an option that is scored, as LLM-Embedder's released code puts it. False: an option begins
    its line, as the answers of the demonstrations do."""
    icl_protocol: str = later("llm_embedder")
    """llm_embedder (A.7), or llm_r (B.9): blank lines between demonstrations, labels of a classification by constrained
    greedy decoding, natural_questions judged after TriviaQA's normalisation."""
    icl_demotion: str = later("none")
    """none (LLM-Embedder), other_tasks (examples of other data sets come after those of the query's kind, among the
    5 * icl_demonstrations best), or other_tasks_by_test_name (as LLM-R released it: nothing is of mnli_m's kind)."""
    chat_turns: int = 1
    lrlm_chunks: int = 2
    """Chunks with their continuation put before the window. Published: 8."""
    lrlm_window_tokens: int = 256
    """The recent text that stands before the desired output is cut to this; at most the data sets' window_tokens.
    Published: 2048."""
    bootstrap_samples: int = 10_000
    """For the 95% intervals (percentile bootstrap over queries)."""
    prompt_tokens: dict[str, int] = field(default_factory=dict, metadata={"later": True})
    """By task (qa, icl, chat): a prompt and its answer have no more tokens of the reader. Absent: what it reads.
    Published: 1024 of icl, 2048 of the others."""
    search_depth: int = 100
    """Documents kept per query and method in run files."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    name: str = "run"
    seed: int = 42
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    bm25: BM25Config = field(default_factory=BM25Config)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    labeling: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rounds: int = 1
    """How often candidates are mined, scored and trained on, each round from the initial embedder's weights with the
    last round's embedder as miner (LLM-R: 2, methods.md B.1). LLM scores of earlier rounds are not paid for again."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    """How documents are searched where a run is evaluated and served."""
    reader: LLMConfig | None = None
    """The LLM that reads what is retrieved in evaluation, where it is not the one that gave the feedback. In a file,
    what it leaves unsaid but for the model and its endpoint is as in `llm`."""
    annotators: dict[str, LLMConfig] = field(default_factory=dict)
    """LLMs that label beside `llm`, by names of one's own; what enough of them say is the label. In a file, what they
    leave unsaid but for the model and its endpoint is as in `llm`, so that they read the same text."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    """What the report shows; never part of an artifact's id."""
    serving: ServingSettings = field(default_factory=ServingSettings)
    """How `llmr serve` serves the run; never part of an artifact's id."""

    def max_tokens(self, task: str, side: str) -> int:
        """To how many tokens a "query" or "document" of a task is cut before it is embedded."""
        of_all: int = getattr(self.embedder, f"max_{side}_tokens")
        # An embedder that is only compared may read less.
        return min(getattr(self.tasks[task].embed, f"max_{side}_tokens") or of_all, of_all)

    @property
    def all_annotators(self) -> dict[str, LLMConfig]:
        """Every LLM that labels, by its name: `llm` and those beside it."""
        return {LLM: self.llm, **self.annotators}


def later_identity(value: Any) -> dict[str, Any]:
    """Of `identity`, the fields that came `later` and are not at their default: for stages that name the others."""
    named = {item.name for item in dataclasses.fields(value) if item.metadata.get("later")}
    return {name: set_to for name, set_to in identity(value).items() if name in named}


def question_tasks(config: Config) -> dict[str, TaskQuestions]:
    """Settings of the tasks that a run's data sets use and about whose documents the LLM writes questions."""
    used = sorted({dataset.task for dataset in config.datasets.values()})
    return {task: config.tasks[task].questions for task in used if config.tasks[task].questions.num_documents}


def training_seed(config: Config, train: TrainConfig) -> int:
    """The seed of one training."""
    return config.seed if train.seed is None else train.seed


def as_trained(config: Config) -> Config:
    """The configuration as the trained embedder is to read texts: without instructions where train.instructions is
    off."""
    if config.train.instructions:
        return config
    bare = {
        name: dataclasses.replace(task, query_instruction="", document_instruction="")
        for name, task in config.tasks.items()
    }
    return dataclasses.replace(config, tasks=bare)


def identity(value: Any) -> Any:
    """A config object as plain JSON values, for hashing. Fields that came `later` are left out at their default."""
    if isinstance(value, dict):
        return {key: identity(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return {
        item.name: identity(getattr(value, item.name))
        for item in dataclasses.fields(value)
        if not item.metadata.get("later") or getattr(value, item.name) not in (item.default, {}, [])
    }
