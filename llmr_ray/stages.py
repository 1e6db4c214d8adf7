"""Which stages a configuration has, what each of them makes, and what each of them is given.

Ids depend only on the configuration and on the ids of inputs, so all stages are known before any has run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmr_ray import cluster
from llmr_ray.artifacts import Artifact, ArtifactSpec
from llmr_ray.assets import Asset
from llmr_ray.config import LLM, ComparedEmbedder, Config, as_trained, question_tasks
from llmr_ray.data import stage as data
from llmr_ray.evaluation import agreement, leakage_stage, look
from llmr_ray.evaluation import stage as evaluation
from llmr_ray.evaluation.annotators import stage_of
from llmr_ray.feedback import stage as feedback
from llmr_ray.feedback.requests import LLMClient
from llmr_ray.index import stage as index
from llmr_ray.labeling import canaries, consensus, generation
from llmr_ray.labeling import stage as labeling
from llmr_ray.mining import stage as mining
from llmr_ray.modeling.encoding import encode_each
from llmr_ray.training import reward_model
from llmr_ray.training import stage as training

MAKES = {
    "mine": "candidates",
    "score": "llm_scores",
    "reward": "rewards",
    "agree": "agreement",
    "canary": "canaries",
    "consensus": "llm_scores",
    "label": "labels",
    "group": "groups",
    "train": "checkpoint",
}
"""What a stage's artifact is called where it is read; the others are called like their stage."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the plan: its artifact, what the stage is given, and the function that makes the artifact.

    base_name: the stage's name without its round.
    """

    name: str
    base_name: str
    artifact: Artifact
    inputs: dict[str, Any]
    run: Callable[[Artifact], None]

    def require_inputs(self) -> None:
        """Raises DataError naming the first input artifact that is not finished."""
        for value in self.inputs.values():
            for item in value.values() if isinstance(value, dict) else [value]:
                if isinstance(item, Artifact):
                    item.require()


def in_round(name: str, number: int, rounds: int) -> str:
    """A stage's name in a round: those of the last, often the only one, have the plain names."""
    return name if number == rounds else f"{name}_{number}"


@dataclass(frozen=True, kw_only=True)
class _Retriever:
    """Vectors of all texts by one embedder, and the index of the documents."""

    embeddings: Artifact
    index: Artifact


class StagePlan:
    """The stages of a configuration, in the order they run.

    Args:
        config: the resolved configuration.
        assets: the models and data sets it names.
        client: asks the LLM.
        reader: asks the LLM that reads in evaluation; None: the same.
        annotators: the LLMs that label beside it, each with what asks it; their names are those of the configuration.
        allow_restart: train anew where none of the checkpoints of an unfinished training is valid.
    """

    def __init__(
        self,
        config: Config,
        assets: dict[str, Asset],
        client: LLMClient,
        reader: LLMClient | None = None,
        *,
        annotators: Mapping[str, tuple[Asset, LLMClient]] | None = None,
        allow_restart: bool = False,
    ) -> None:
        self.annotators = annotators or {}
        self.config, self.client, self.allow_restart = config, client, allow_restart
        self.base, self.llm = assets[config.embedder.model], assets[config.llm.model]
        self.reader, self.reader_model = reader or client, assets[(config.reader or config.llm).model]
        self.teacher = assets[config.reward_model.model] if config.reward_model.model else None
        self.stages: list[Stage] = []
        self._round = 0
        self._labels: Artifact | None = None
        self.prepare = self._add("prepare", data.prepare_spec(config, assets), data.run_prepare, assets=assets)
        if question_tasks(config):
            self.prepare = self._generated()
        miner = self._embed_and_index("base", self.base)
        self.retrievers = {"base": miner}
        self.compared = {
            name: self._embed_and_index(name, assets[other.model], _embedding_by(config, other))
            for name, other in config.evaluate.embedders.items()
            if name in config.evaluate.methods
        }
        spec = leakage_stage.leakage_spec(self.prepare)
        self._add("leakage", spec, leakage_stage.run_leakage, prepare=self.prepare)
        if canaries.label_tasks(config):
            self._canaries()
        for number in range(1, config.rounds + 1):
            self._round = number
            miner = self._train(self._groups(miner))
            self.retrievers["trained" if number == config.rounds else f"round_{number}"] = miner
            self._evaluate()

    def _add(
        self, name: str, spec: ArtifactSpec, run: Callable[..., None], config: Config | None = None, **inputs: Any
    ) -> Artifact:
        artifact = Artifact(self.config.runtime.artifact_root, spec)
        full_name = in_round(name, self._round, self.config.rounds) if self._round else name
        made = partial(run, config or self.config, **inputs)
        self.stages.append(Stage(name=full_name, base_name=name, artifact=artifact, inputs=inputs, run=made))
        return artifact

    def _generated(self) -> Artifact:
        """What was prepared and the questions that the LLM writes: in place of `prepare` for all that follows."""
        spec = generation.generate_spec(self.config, llm=self.llm, base=self.base, prepare=self.prepare)
        generate = partial(generation.run_generate, vectors=partial(_vectors, self.config, self.base))
        return self._add("generate", spec, generate, client=self.client, prepare=self.prepare)

    def _canaries(self) -> None:
        """What tries to talk each LLM that labels into a high score."""
        for name, own, llm, client in self._annotating():
            spec = canaries.canary_spec(own, llm, self.prepare)
            self._add(stage_of("canary", name), spec, canaries.run_canary, own, client=client, prepare=self.prepare)

    def _annotating(self) -> Iterator[tuple[str, Config, Asset, LLMClient]]:
        """Every LLM that labels: its name, the configuration with it as `llm`, the model, and what asks it."""
        for name, asked in {LLM: (self.llm, self.client), **self.annotators}.items():
            yield name, replace(self.config, llm=self.config.all_annotators[name]), *asked

    def _embed_and_index(self, which: str, embedder: Asset, config: Config | None = None) -> _Retriever:
        """The texts' vectors by an embedder, as a configuration says (without one, as the run's does)."""
        of: dict[str, Any] = {"embedder": embedder, "prepare": self.prepare}
        spec = index.embed_spec(config or self.config, **of)
        vectors = self._add(f"embed_{which}", spec, index.run_embed, config, **of)
        built: dict[str, Any] = {"embeddings": vectors}
        documents = self._add(f"index_{which}", index.index_spec(self.config, **built), index.run_index, **built)
        return _Retriever(embeddings=vectors, index=documents)

    def _groups(self, miner: _Retriever) -> Artifact:
        """What a round trains on: from candidates by way of the LLM's scores to groups."""
        config, prepare, again = self.config, self.prepare, self._round > 1
        of: dict[str, Any] = {"prepare": prepare, "embeddings": miner.embeddings, "index": miner.index}
        mine = partial(mining.run_mine, again=again)
        candidates = self._add("mine", mining.mine_spec(config, again=again, **of), mine, **of)
        if config.labeling.enabled:
            return self._labelled(candidates, miner)
        of = {"prepare": prepare, "candidates": candidates}
        of = {"prepare": prepare, "llm_scores": self._scored(feedback.run_score, of)}
        rewards = self._add("reward", feedback.reward_spec(config, **of), feedback.run_reward, **of)
        if self.teacher:
            rewards = self._taught(candidates, rewards, self.teacher)
        of = {"prepare": prepare, "candidates": candidates, "rewards": rewards}
        return self._add("group", training.group_spec(config, **of), training.run_group, **of)

    def _labelled(self, candidates: Artifact, miner: _Retriever) -> Artifact:
        """The groups of a round of adaptive labelling: which pairs the LLM is asked about, and what all labels say."""
        config, round_of = self.config, {"prepare": self.prepare, "labels": self._labels}
        of: dict[str, Any] = {**round_of, "candidates": candidates, "embeddings": miner.embeddings}
        select = partial(labeling.run_select, number=self._round)
        selected = self._add("select", labeling.select_spec(config, number=self._round, **of), select, **of)
        of = {"prepare": self.prepare, "candidates": selected}
        if config.labeling.annotator == "gold":
            scores = self._add("score", labeling.gold_spec(config, **of), labeling.run_gold, **of)
        else:
            scores = self._scored(partial(feedback.run_score, table="asked"), of)
        of = {**round_of, "embeddings": miner.embeddings, "selected": selected, "llm_scores": scores}
        self._labels = self._add("label", labeling.label_spec(config, **of), labeling.run_label, **of)
        of = {"prepare": self.prepare, "candidates": selected, "rewards": self._labels}
        return self._add("group", training.group_spec(config, **of), training.run_group, **of)

    def _scored(self, score: Callable[..., None], of: dict[str, Any]) -> Artifact:
        """The LLM's scores; where several LLMs label, what enough of them say."""
        said = {}
        for name, own, llm, client in self._annotating():
            spec = feedback.score_spec(own, llm, **of)
            said[name] = self._add(stage_of("score", name), spec, score, own, client=client, **of)
        if len(said) == 1:
            return said[LLM]
        spec = consensus.consensus_spec(self.config, said)
        return self._add("consensus", spec, consensus.run_consensus, llm_scores=said)

    def _taught(self, candidates: Artifact, rewards: Artifact, base: Asset) -> Artifact:
        """The rewards of a cross-encoder that learned from the LLM's."""
        config, read = self.config, {"prepare": self.prepare, "candidates": candidates}
        of: dict[str, Any] = {**read, "rewards": rewards, "base": base}
        train = partial(reward_model.run_reward_model, allow_restart=self.allow_restart)
        model = self._add("reward_model", reward_model.reward_model_spec(config, **of), train, **of)
        of = {**read, "reward_model": model}
        taught = self._add("teach", reward_model.teach_spec(config, **of), reward_model.run_teach, **of)
        embeddings = {name: retriever.embeddings for name, retriever in self.retrievers.items()}
        of = {"prepare": self.prepare, "rewards": rewards, "taught": taught, "embeddings": embeddings}
        self._add("agree", agreement.agree_spec(config, **of), agreement.run_agree, **of)
        return taught

    def _train(self, groups: Artifact) -> _Retriever:
        """Training of a round, always from the initial embedder, and the trained retriever."""
        config = as_trained(self.config)
        run = partial(
            training.run_train,
            beside=partial(_early_look, config, self.prepare, self.base),
            looks=partial(look.read_looks, Path(self.config.runtime.run_root) / self.config.name),
            allow_restart=self.allow_restart,
        )
        spec = training.train_spec(config, groups, self.base)
        checkpoint = self._add("train", spec, run, config, groups=groups, base=self.base)
        # What training makes is determined by the checkpoint's id, so the id stands for the weights' fingerprint.
        trained = Asset(name="trained", kind="model", path=checkpoint.file("embedder"), fingerprint=checkpoint.id)
        return self._embed_and_index("trained", trained, config)

    def _evaluate(self) -> None:
        """Evaluates all rounds so far: what the LLM answered before is in its store."""
        methods = list(self.config.evaluate.methods)
        if "trained" in methods:
            place = methods.index("trained")
            methods[place : place + 1] = [name for name in self.retrievers if name != "base"]
        evaluate = replace(self.config.evaluate, methods=methods)
        config = replace(self.config, evaluate=evaluate, llm=self.config.reader or self.config.llm)
        retrievers = self.retrievers | self.compared
        searched: dict[str, Any] = {
            "prepare": self.prepare,
            "embeddings": {name: retriever.embeddings for name, retriever in retrievers.items()},
            "indexes": {name: retriever.index for name, retriever in retrievers.items()},
        }
        spec = evaluation.evaluate_spec(config, self.reader_model, **searched)
        self._add("evaluate", spec, evaluation.run_evaluate, config, client=self.reader, **searched)


def _embedding_by(config: Config, other: ComparedEmbedder) -> Config:
    """The configuration by which an embedder that is only compared embeds."""
    tasks = {
        name: replace(
            task,
            query_instruction=other.query_instructions.get(name, ""),
            document_instruction=other.document_instructions.get(name, ""),
        )
        for name, task in config.tasks.items()
    }
    return replace(config, embedder=other, tasks=tasks)


def _vectors(config: Config, base: Asset, task: str, asked: Sequence[tuple[str, list[str]]]) -> list[np.ndarray]:
    """What `encode_each` gives, made in another process."""
    made = cluster.background(
        encode_each, str(base.path.resolve()), config, task, asked, num_gpus=config.runtime.encode_gpus
    )
    vectors: list[np.ndarray] = made.result()
    return vectors


def _early_look(
    config: Config, prepare: Artifact, base: Asset, checkpoint: Artifact, root: Path
) -> AbstractContextManager[None]:
    """Measures the checkpoints in `root` beside training, if the configuration asks for it and there is what to ask."""
    sets: list[look.LookSet] = []
    if config.runtime.look_queries:
        sets = look.look_sets(prepare, config.runtime.look_queries)

    def start(model: Path) -> Future[look.Measured]:
        return cluster.background(
            look.measure_model, str(model.resolve()), sets, config, num_gpus=config.runtime.encode_gpus
        )

    run_dir = Path(config.runtime.run_root) / config.name
    return look.early_look(start if sets else None, root, base=base.path, folder=run_dir, artifact_id=checkpoint.id)
