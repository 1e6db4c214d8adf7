"""Looking into LLM stores: where they are, what they hold, how two of them differ."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from llmr_ray.errors import ConfigError, DataError
from llmr_ray.feedback.segments import list_segments, settled
from llmr_ray.feedback.store import LLMStore, answers_of


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What the store of one scorer holds. A key is one likelihood target, or one question to sample from.

    targets, sampled_texts: keys with log-probabilities; texts of the other keys.
    prompt_tokens: summed over keys, so a prompt counts for each of its targets; target_tokens: log-probabilities.
    truncated_share: of the keys, those whose prompt was shortened to fit; None without keys.
    segments, duplicate_rows, bytes: files, rows in them whose key has a later answer, and size on disk.
    """

    keys: int
    targets: int
    sampled_texts: int
    prompt_tokens: int
    target_tokens: int
    truncated_share: float | None
    segments: int
    duplicate_rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StoreDiff:
    """How the answers of one scorer in two stores, a and b, differ.

    only_a, only_b, both: keys.
    largest_difference, mean_difference: absolute, of the log-probabilities of `compared_tokens` tokens; None if none.
    other_lengths: keys in both with another number of tokens; these are not compared.
    other_texts: keys in both whose sampled texts are not equal.
    """

    only_a: int
    only_b: int
    both: int
    compared_tokens: int
    largest_difference: float | None
    mean_difference: float | None
    other_lengths: int
    other_texts: int


def scorer_folders(store: Path, scorer: str | None = None) -> dict[str, Path]:
    """The folders of the scorers in an artifact root, an `llm_store` folder, or one scorer's folder, by scorer id.

    Args:
        store: any of the three.
        scorer: only this one.

    Raises:
        DataError: there is no store.
        ConfigError: `scorer` is not there.
    """
    root = store / "llm_store" if (store / "llm_store").is_dir() else store
    if list_segments(root):
        found = {root.resolve().name: root}
    elif root.is_dir():
        is_root = root.name == "llm_store"
        found = {
            path.name: path for path in sorted(root.iterdir()) if path.is_dir() and (is_root or list_segments(path))
        }
    else:
        found = {}
    if not found:
        raise DataError(
            f"{store} holds no LLM answers, so there is nothing to read. Name an artifact root "
            "(runtime.artifact_root), its `llm_store` folder, or the folder of one scorer in there."
        )
    if scorer is None:
        return found
    if scorer not in found:
        raise ConfigError(f"{store} has no scorer '{scorer}'. It has: {', '.join(found)}.")
    return {scorer: found[scorer]}


def pair_scorers(a: Path, b: Path, scorer: str | None = None) -> dict[str, tuple[Path, Path]]:
    """The folders to compare in two stores (each as in `scorer_folders`): those of equal scorer ids.

    Two folders of one scorer each are a pair whatever they are called. Raises DataError when nothing can be compared.
    """
    of_a, of_b = scorer_folders(a, scorer), scorer_folders(b, scorer)
    if list(of_a.values()) == [a] and list(of_b.values()) == [b]:
        return {next(iter(of_a)): (a, b)}
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        raise DataError(
            f"{a} and {b} have no scorer in common ({', '.join(of_a)} against {', '.join(of_b)}), so they share no key "
            "and nothing can be compared. Compare stores that the same model, engine, dtype and token limit filled."
        )
    return {name: (of_a[name], of_b[name]) for name in common}


def store_stats(folder: Path) -> StoreStats:
    """Counts what a scorer's folder holds. Reads all of it."""
    return settled(lambda: _stats(LLMStore(folder)))


def diff_stores(a: Path, b: Path) -> StoreDiff:
    """Compares a scorer's answers in the folders `a` and `b`. Reads all of both."""
    return settled(lambda: _diff(LLMStore(a), LLMStore(b)))


def _stats(store: LLMStore) -> StoreStats:
    segments = store.segments()
    keys = targets = texts = prompt_tokens = target_tokens = truncated = 0
    for batch in store.scan(segments):
        sampled = pc.list_value_length(batch["texts"])
        keys += batch.num_rows
        targets += pc.sum(pc.equal(sampled, 0)).as_py() or 0
        texts += pc.sum(sampled).as_py() or 0
        prompt_tokens += pc.sum(batch["num_prompt_tokens"]).as_py() or 0
        target_tokens += pc.sum(pc.list_value_length(batch["logprobs"])).as_py() or 0
        truncated += pc.sum(batch["truncated"]).as_py() or 0
    return StoreStats(
        keys=keys,
        targets=targets,
        sampled_texts=texts,
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        truncated_share=truncated / keys if keys else None,
        segments=len(segments),
        duplicate_rows=sum(segment.num_rows for segment in segments) - keys,
        bytes=sum(segment.path.stat().st_size for segment in segments),
    )


def _diff(a: LLMStore, b: LLMStore) -> StoreDiff:
    only_a = both = tokens = other_lengths = other_texts = 0
    largest = total = 0.0
    for batch in a.scan():
        ours = list(answers_of(batch["key"].to_pylist(), batch))
        theirs = b.get([answer.key for answer in ours])
        only_a += len(ours) - len(theirs)
        both += len(theirs)
        pairs = [(answer, theirs[answer.key]) for answer in ours if answer.key in theirs]
        other_texts += sum(one.texts != other.texts for one, other in pairs)
        other_lengths += sum(len(one.logprobs) != len(other.logprobs) for one, other in pairs)
        equal = [(one, other) for one, other in pairs if len(one.logprobs) == len(other.logprobs)]
        differences = np.abs(
            np.array([value for one, _ in equal for value in one.logprobs])
            - np.array([value for _, other in equal for value in other.logprobs])
        )
        tokens += len(differences)
        total += float(differences.sum())
        largest = max(largest, float(differences.max(initial=0.0)))
    return StoreDiff(
        only_a=only_a,
        only_b=len(b) - both,
        both=both,
        compared_tokens=tokens,
        largest_difference=largest if tokens else None,
        mean_difference=total / tokens if tokens else None,
        other_lengths=other_lengths,
        other_texts=other_texts,
    )
