"""What a run may spend, where it runs and what its report shows: settings that change no result and no id."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What one call of the command may spend on the LLM; never part of an artifact's id."""

    max_tokens: int = 0
    """LLM tokens computed. 0: no limit."""
    max_hours: float = 0.0
    """Hours from the first question to the LLM. 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows beside a run's own figures; never part of an artifact's id."""

    audit_queries: int = 300
    """Training queries that audit.html shows with all their candidates, by a hash of the id and in equal shares of the
    tasks. Its counts are of all queries in any case. 0: no such page."""
    audit_megabytes: float = 4.0
    """Queries that would make the page's data larger are left out, the last by that hash first."""
    reproduces: list[str] = field(default_factory=list)
    """Published tables whose figures stand beside the run's, by their names in llmr_ray/evaluation/published.yaml."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Speed and place only; never part of an artifact's id."""

    artifact_root: str = "artifacts"
    run_root: str = "runs"
    cache_root: str = ""
    """Where sample models and data are kept; empty: $LLMR_CACHE or ~/.cache/llmr_ray."""
    logical_cpus: int = 16
    """Of a local Ray (RAY_ADDRESS unset): covers every actor and one read and write each. Threads bound the work."""
    object_store_mb: int = 512
    log_workers: bool = False
    """Show the output of Ray workers in the driver's log."""
    encode_actors: int = 2
    """Of the stage embed; without a GPU they also tokenise the training data."""
    encode_threads: int = 1
    encode_batch_tokens: int = 8192
    encode_gpus: float = 0
    mine_actors: int = 2
    llm_actors: int = 1
    llm_threads: int = 2
    llm_gpus: float = 0
    """GPUs of each actor; over more than one, vLLM spreads the model (tensor parallel)."""
    llm_kv_cache_gb: float = 1.0
    llm_max_batched_tokens: int = 2048
    llm_max_sequences: int = 64
    llm_scoring: str = "auto"
    """What computes log-probabilities beside a vLLM engine: tree (packed token trees), engine (vLLM itself), or auto:
    measured once for each kind of work. They agree to 1e-4 in float32."""
    train_workers: int = 2
    train_threads: int = 1
    train_gpus: bool = False
    train_grad_cache: bool = False
    """Large batches in small memory: activations of one pass at a time, for one more forward pass; same gradient."""
    train_checkpointing: bool = False
    """Long texts in small memory: activations of one layer at a time, for one more forward pass; same gradient."""
    train_max_failures: int = 3
    look_queries: int = 0
    """Early look: development queries of each data set by which checkpoints are measured while training goes on."""
    stop_seconds: float = 25.0
    """How long SIGTERM or Ctrl-C leaves training for the step at hand and a checkpoint; less than what the platform
    grants before it kills."""
    trackers: list[str] = field(default_factory=list)
    """Who is told of every training step besides the step records: tensorboard, mlflow, wandb."""
    index_actors: int = 2
    index_shards: int = 2
    index_threads: int = 1
    index_scan: str = "auto"
    """How exact searches compare: float32 (FAISS), int8 (bounds by 8-bit products, then exact scores; the same result,
    and a file of a quarter of the vectors' bytes beside each shard), or auto: int8 where this CPU is faster at it."""
    index_gpus: float = 0
    """Of each actor that searches an index, mining ones included."""
    stall_timeout_s: float = 600.0
