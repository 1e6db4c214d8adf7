"""MTEB's retrieval tasks through the sharded index, as mteb itself runs them."""

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import SearchProtocol
from sentence_transformers import SentenceTransformer

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import resolve
from llmr_ray.config import Config, DatasetConfig, EmbedderConfig, RuntimeConfig, TaskConfig
from llmr_ray.data.stage import prepare_spec, run_prepare
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError
from llmr_ray.evaluation.mteb_search import RaySearch
from llmr_ray.evaluation.mteb_task import retrieval_task
from llmr_ray.modeling.embedder import Embedder
from tests.tiny import tiny_bert

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_DOCUMENTS, NUM_QUERIES = 90, 12
LETTERS = list("abcdefghij")
PROMPTS = TaskConfig(query_instruction="query : ", document_instruction="document : ")


def texts(number: int, length: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(LETTERS, length)) for _ in range(number)]


CORPUS = Dataset.from_dict(
    {
        "id": [f"d{row}" for row in range(NUM_DOCUMENTS)],
        "title": ["t" if row % 3 else "" for row in range(NUM_DOCUMENTS)],
        "text": texts(NUM_DOCUMENTS, 5, 0),
    }
)
QUERIES = Dataset.from_dict({"id": [f"q{row}" for row in range(NUM_QUERIES)], "text": texts(NUM_QUERIES, 4, 1)})


class LettersRetrieval(AbsTaskRetrieval):
    k_values = (1, 10, 20)
    metadata = TaskMetadata(
        name="LettersRetrieval",
        description="Generated words.",
        dataset={"path": "none/none", "revision": "1"},
        type="Retrieval",
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **_: Any) -> None:
        relevant = {f"q{row}": {f"d{row}": 1, f"d{row + 30}": 1} for row in range(NUM_QUERIES)}
        split = {"corpus": CORPUS, "queries": QUERIES, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def search(local_ray: RuntimeConfig, model: Path, tmp_path_factory: pytest.TempPathFactory) -> RaySearch:
    embedder = EmbedderConfig(model=str(model), max_query_tokens=12, max_document_tokens=16, precision="float32")
    root = str(tmp_path_factory.mktemp("artifacts"))
    runtime = RuntimeConfig(artifact_root=root, index_shards=3, index_actors=1, encode_actors=1)
    return RaySearch(embedder, PROMPTS, runtime)


@pytest.fixture(scope="module")
def cosines(model: Path) -> np.ndarray:
    """Of every query and document, by the same embedder and a product of two matrices."""
    embedder = Embedder(model, max_query_tokens=12, max_document_tokens=16, precision="float32")
    documents = [document_text(title, text) for title, text in zip(CORPUS["title"], CORPUS["text"], strict=True)]
    sides = (
        (list(QUERIES["text"]), PROMPTS.query_instruction, 12),
        (documents, PROMPTS.document_instruction, 16),
    )
    query_QD, doc_ND = (
        embedder.encode(of, instruction=instruction, max_tokens=most, batch_tokens=4096)
        for of, instruction, most in sides
    )
    return query_QD @ doc_ND.T


def test_mteb_runs_a_task_and_ranks_as_brute_force_does(search: RaySearch, cosines: np.ndarray, tmp_path: Path) -> None:
    """A shifted row, a lost shard or a wrong instruction only shows as a worse figure in a leaderboard."""
    assert isinstance(search, SearchProtocol)
    result = mteb.evaluate(
        search, LettersRetrieval(), cache=None, prediction_folder=tmp_path, co2_tracker=False, show_progress_bar=False
    )
    [figures] = result.task_results[0].scores["test"]
    ranks = np.argsort(-cosines, axis=1, kind="stable")
    gains = 1 / np.log2(np.arange(2, 12))
    ndcg = [
        sum(gains[place] for place in range(10) if ranks[row, place] in (row, row + 30)) / gains[:2].sum()
        for row in range(NUM_QUERIES)
    ]
    assert figures["ndcg_at_10"] == pytest.approx(np.mean(ndcg), abs=1e-4)
    [saved] = tmp_path.rglob("*predictions.json")
    found = json.loads(saved.read_text())["default"]["test"]
    for row in range(NUM_QUERIES):
        best = ranks[row, :20]
        assert list(found[f"q{row}"]) == [f"d{at}" for at in best]
        np.testing.assert_allclose(list(found[f"q{row}"].values()), cosines[row, best], atol=1e-5)


def test_a_task_of_the_sample_data_is_measured_as_by_sentence_transformers(
    local_ray: RuntimeConfig, tmp_path: Path
) -> None:
    """Real questions, passages and weights: MTEB measures the sharded index as its own route over the same model."""
    config = Config(
        datasets={
            "hotpotqa": DatasetConfig(task="qa", source="hotpotqa", path="hotpotqa", num_test=25, num_documents=300)
        },
        runtime=RuntimeConfig(artifact_root=str(tmp_path), mine_actors=1, index_shards=3, encode_actors=1),
    )
    assets = {name: resolve(name) for name in ("hotpotqa", "minilm-l6", config.llm.model)}
    prepare = Artifact(tmp_path, prepare_spec(config, assets))
    prepare.make(lambda: run_prepare(config, prepare, assets))
    embedder = EmbedderConfig(
        model="minilm-l6", pooling="mean", max_query_tokens=64, max_document_tokens=64, precision="float32"
    )
    theirs = SentenceTransformer(str(assets["minilm-l6"].path), device="cpu", local_files_only=True)
    theirs.max_seq_length = 64
    told = []
    for model in (RaySearch(embedder, runtime=config.runtime), theirs):
        result = mteb.evaluate(
            model, retrieval_task(prepare, "hotpotqa"), cache=None, co2_tracker=False, show_progress_bar=False
        )
        [figures] = result.task_results[0].scores["test"]
        told.append([figures[name] for name in ("ndcg_at_10", "recall_at_10", "map_at_100")])
    assert told[0] == pytest.approx(told[1], abs=1e-5)
    assert 0.5 < told[0][0] < 1


def how(**more: Any) -> dict[str, Any]:
    task = LettersRetrieval.metadata
    return {
        "task_metadata": task,
        "hf_split": "test",
        "hf_subset": "default",
        "encode_kwargs": {},
        "num_proc": None,
    } | more


def test_what_was_embedded_is_found_again(search: RaySearch) -> None:
    """A second run of a benchmark, or one after a kill, must not pay for the corpus twice."""
    root = Path(search._config.runtime.artifact_root)
    search.index(CORPUS, **how())
    before = {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")}
    assert before
    again = RaySearch(search._config.embedder, PROMPTS, search._config.runtime)
    again.index(CORPUS, **how())
    assert {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")} == before
    assert again.mteb_model_meta.revision == search.mteb_model_meta.revision
    other = RaySearch(search._config.embedder, TaskConfig(), search._config.runtime)
    assert other.mteb_model_meta.revision != search.mteb_model_meta.revision


def test_reranking_scores_the_documents_that_are_named(search: RaySearch, cosines: np.ndarray) -> None:
    """Searching all documents instead would let a reranking task find what its first stage missed."""
    search.index(CORPUS, **how())
    named = {f"q{row}": [f"d{(row * 7 + step) % NUM_DOCUMENTS}" for step in range(6)] for row in range(NUM_QUERIES)}
    found = search.search(QUERIES, top_k=4, top_ranked=named, **how())
    for row in range(NUM_QUERIES):
        scores = {doc_id: cosines[row, int(doc_id[1:])] for doc_id in named[f"q{row}"]}
        best = sorted(scores, key=lambda doc_id: -scores[doc_id])[:4]
        assert list(found[f"q{row}"]) == best
        np.testing.assert_allclose(list(found[f"q{row}"].values()), [scores[one] for one in best], atol=1e-5)
    with pytest.raises(DataError, match="lacks"):
        search.search(QUERIES, top_k=4, top_ranked={"q0": ["nowhere"]}, **how())


def test_bad_corpora_are_refused(search: RaySearch) -> None:
    """Two documents of one id would be one in MTEB's results."""
    with pytest.raises(DataError, match="ids"):
        search.index(Dataset.from_dict({"id": ["a", "a"], "text": ["b", "c"]}), **how())
    with pytest.raises(DataError, match="no text"):
        search.index(Dataset.from_dict({"id": ["a"], "text": [["b", "c"]]}), **how())
