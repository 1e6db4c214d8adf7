"""What the contenders of benchmarks/training.py train on and with."""

import json
from pathlib import Path
from typing import Any

WORKLOADS = {
    f"{lengths}_{loss}": f"{told_lengths}, {told_loss}"
    for lengths, told_lengths in (("mixed", "lognormal lengths"), ("equal", "texts of 64 tokens"))
    for loss, told_loss in (("contrastive", "in-batch and hard negatives"), ("distill", "KL to a teacher's scores"))
} | {"workers": "lognormal lengths, in-batch and hard negatives, two workers"}
BATCH_SIZE, DOCUMENTS, EQUAL_TOKENS, MAX_TOKENS = 16, 7, 64, 128
TEMPERATURE, LEARNING_RATE, SEED = 0.05, 2e-5, 0


def make_examples(workload: str, number: int, model: str) -> list[dict[str, Any]]:
    """Queries with seven documents each, the first of them gold, and a teacher's scores; no text occurs twice.

    Texts are random words that are one token each, so that lengths are exact.
    """
    import numpy as np
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())
    rng = np.random.default_rng(SEED)
    seen: set[str] = set()

    def text(median: float) -> str:
        tokens = EQUAL_TOKENS
        if not workload.startswith("equal"):
            tokens = int(np.clip(rng.lognormal(np.log(median), 0.6), 5, MAX_TOKENS))
        made = " ".join(rng.choice(words, tokens - 2))
        assert made not in seen
        seen.add(made)
        return made

    return [
        {
            "query": text(20),
            "docs": [text(46) for _ in range(DOCUMENTS)],
            "scores": rng.normal(size=DOCUMENTS).astype(np.float32).tolist(),
        }
        for _ in range(number)
    ]


def useful_flops(examples: list[dict[str, Any]], model: str) -> float:
    """Operations of forward and backward over the tokens there are: linear layers, attention scores and sums."""
    config = json.loads((Path(model) / "config.json").read_text())
    width, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    lengths = [len(text.split()) + 2 for example in examples for text in (example["query"], *example["docs"])]
    return sum(3 * layers * (2 * n * (4 * width**2 + 2 * width * inner) + 4 * n * n * width) for n in lengths)


def padding_waste(examples: list[dict[str, Any]], batch_size: int) -> float:
    """Share of padding where queries and documents of a batch are each padded to their longest."""
    real = padded = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for texts in ([e["query"] for e in batch], [doc for e in batch for doc in e["docs"]]):
            lengths = [len(text.split()) + 2 for text in texts]
            real += sum(lengths)
            padded += max(lengths) * len(lengths)
    return 1 - real / padded


def train_config(batch_size: int, steps: int) -> Any:
    """What all contenders train with."""
    from llmr_ray.config import TrainConfig

    return TrainConfig(
        num_steps=steps,
        global_batch_size=batch_size,
        group_size=DOCUMENTS,
        learning_rate=LEARNING_RATE,
        warmup_fraction=0.5,
        temperature=TEMPERATURE,
        self_paced=False,
        checkpoint_interval=0,
        dropout=False,
    )
