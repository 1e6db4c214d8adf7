"""The stage generate: every question that was asked for is accounted for, and only sound ones go on."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from llmr_ray.artifacts import Artifact, seed_of
from llmr_ray.assets import Asset
from llmr_ray.config import BM25Config, Config, DatasetConfig, LLMConfig, RuntimeConfig, TaskConfig, TaskMine, TaskScore
from llmr_ray.evaluation.report import questions_told
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import EngineSettings, open_engine, scorer_id
from llmr_ray.feedback.planning import question_costs, upper_costs
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.feedback.store import LLMStore
from llmr_ray.index.shards import Opening
from llmr_ray.index.stage import IndexWorker, index_spec
from llmr_ray.index.vectors import to_table
from llmr_ray.labeling.generation import drawn_documents, generate_spec, run_generate
from llmr_ray.labeling.settings import TaskQuestions
from llmr_ray.mining.stage import MineWorker
from llmr_ray.schemas import table_of
from tests.feedback_world import make_artifact
from tests.tiny_llm import save_model

LLM, BASE = (Asset(name, "model", None, f"of {name}") for name in ("llm", "base"))

TOWNS = ["Arden", "Brill", "Corwen", "Dunster", "Eyam", "Fowey", "Gorran", "Hythe", "Ilam", "Jevington"]
TEXTS = [
    f"{town} is a town by the sea whose mill was built by {town} Miller in 18{n}0." for n, town in enumerate(TOWNS)
]
TEST_QUESTION = "Who was the builder of the old mill of Brill?"
DEV_QUESTION = "Which town of the county has the mill of 1820?"

SAYS = {
    "Arden": " Who built the mill of Arden?\nIn which year was the mill at Arden built?",
    "Brill": f" {TEST_QUESTION.lower()}\n{TEST_QUESTION.replace('old mill', 'old mills')}",
    "Corwen": f" {DEV_QUESTION}\nThe mill of Corwen was built by whom",
    "Eyam": " What does this passage say about Eyam?",
    "Fowey": " Who painted the mill of Fowey?\nWho built the mill of Fowey?",
}
"""What the LLM writes about each town; about Dunster it fails, about the others it writes nothing."""


def config_of(root, **changes):
    questions = TaskQuestions(**{"num_documents": len(TOWNS), "num_demonstrations": 2, "num_clusters": 2} | changes)
    return Config(
        datasets={"main": DatasetConfig(task="qa"), "tools": DatasetConfig(task="tool")},
        tasks={"qa": TaskConfig(questions=questions, mine=TaskMine(with_gold=False)), "tool": TaskConfig()},
        llm=LLMConfig(engine="transformers", max_model_tokens=255, max_candidate_tokens=40),
        runtime=RuntimeConfig(artifact_root=str(root), llm_threads=1),
    )


@pytest.fixture
def prepare(tmp_path):
    """Towns in a shared pool, a dialogue in one of its own, and questions of all splits; two of them train."""
    given = [
        ("t0", "train", "Who owns the harbour of Gorran?", ["main:6", "main:7"]),
        ("t1", "train", "Where does the river Ilam end?", ["main:8"]),
        ("t2", "train", "Which passage answers none of these?", []),
        ("d0", "dev", DEV_QUESTION, ["main:2"]),
        ("e0", "test", TEST_QUESTION, ["main:1"]),
    ]
    queries = [
        {"query_id": name, "task": "qa", "dataset": "main", "split": split, "query": text, "targets": ["x"]}
        | {"pool": "main"}
        for name, split, text, _ in given
    ]
    queries.append(queries[0] | {"query_id": "z", "task": "tool", "dataset": "tools", "query": "add two numbers"})
    corpus = [
        {"doc_id": f"main:{n}", "pool": "main", "position": n, "task": "qa", "text": text}
        for n, text in enumerate(TEXTS)
    ]
    corpus += [
        {"doc_id": f"own:{n}", "pool": "main:dialogue", "position": n, "task": "qa", "text": f"a secret {n}"}
        for n in range(3)
    ]
    qrels = [
        {"query_id": name, "doc_id": doc_id, "relevance": 1} for name, _, _, doc_ids in given for doc_id in doc_ids
    ]
    rows = {"queries": queries, "corpus": corpus, "qrels": qrels}
    return make_artifact(tmp_path, "prepare", {name: table_of(name, table) for name, table in rows.items()})


def vectors(task, asked):
    """Unit vectors drawn by text and side, so that no two texts are near."""

    def one(side, text):
        vector_D = np.random.default_rng(seed_of(side, text)).normal(size=32)
        return vector_D / np.linalg.norm(vector_D)

    return [np.asarray([one(side, text) for text in texts], np.float32) for side, texts in asked]


class ScriptedClient:
    """Writes what `says` has for the town of the last passage, and knows who built each mill."""

    scorer_id = "scripted"

    def __init__(self, says):
        self.says, self.asked = says, []

    def answer(self, requests, *, label):
        self.asked += requests
        return [self._result(request) for request in requests]

    def _result(self, request):
        prompt = "".join(segment.text for segment in request.segments)
        town = prompt.rpartition("Passage: ")[2].split()[0]
        known = {"request_id": request.request_id, "num_computed_tokens": 10, "num_least_tokens": 9}
        if request.temperature:
            if town == "Dunster":
                return LLMResult(request_id=request.request_id, error="too long")
            return LLMResult(texts=(self.says.get(town, ""),), **known)
        said = "painters unknown" if "painted" in prompt else f"{town} Miller"
        return LLMResult(texts=(f" {said} ",), **known)

    @property
    def prompts(self):
        """Of written questions, by document."""
        return {
            json.loads(request.request_id)[1]: "".join(segment.text for segment in request.segments)
            for request in self.asked
            if request.temperature
        }


def generated(config, prepare, client, seed=42):
    config = dataclasses.replace(config, seed=seed)
    artifact = Artifact(config.runtime.artifact_root, generate_spec(config, llm=LLM, base=BASE, prepare=prepare))
    artifact.begin()
    run_generate(config, artifact, vectors=vectors, client=client, prepare=prepare)
    return artifact


def reasons_of_silence(dropped):
    return dropped["not_written"] + dropped["llm_failed"]


def files(artifact):
    return {path.name: path.read_bytes() for path in sorted((artifact.path / "parts").glob("*"))}


def test_every_question_asked_for_is_kept_or_dropped_for_a_reason(tmp_path, prepare):
    """Nothing is lost, nothing of the dev and test questions gets in, and what is kept is a training query."""
    client = ScriptedClient(SAYS)
    artifact = generated(config_of(tmp_path), prepare, client)
    rows = {row["question_id"]: row for row in artifact.read("generated").to_pylist()}
    reasons = {tuple(name.split(":")[2:]): row["reason"] for name, row in rows.items()}
    expected = {
        ("0", "0"): None,
        ("0", "1"): None,
        ("1", "0"): "same_text",
        ("1", "1"): "near_text",
        ("2", "0"): "same_text",
        ("2", "1"): "no_question_mark",
        ("3", "0"): "llm_failed",
        ("3", "1"): "llm_failed",
        ("4", "0"): "needs_passage",
        ("5", "0"): "no_round_trip",
        ("5", "1"): None,
    }
    nothing = {(str(n), str(place)): "not_written" for n in range(len(TOWNS)) for place in range(2)}
    assert reasons == nothing | expected
    counts = artifact.manifest["counts"]
    told = Counter(reason for reason in reasons.values() if reason)
    assert counts["quarantined"] == {"llm_failed": told.pop("llm_failed")}
    assert counts["skipped"] == dict(told)
    assert (counts["rows_in"], counts["ok"]) == (2 * len(TOWNS), 3)
    assert counts["llm_tokens"] == 10 * (len(client.asked) - 1)
    assert rows["generated:main:3:0"]["error"] == "too long"
    [shown] = questions_told(artifact.read("generated"))
    assert (shown["documents"], shown["asked"], shown["kept"]) == (len(TOWNS), 2 * len(TOWNS), 3)
    assert shown["dropped"] == counts["skipped"] | counts["quarantined"]
    assert shown["asked"] - shown["written"] == reasons_of_silence(shown["dropped"])

    queries = {row["query_id"]: row for row in artifact.read("queries").to_pylist()}
    before = {row["query_id"]: row for row in prepare.read("queries").to_pylist()}
    new = {name: row for name, row in queries.items() if name not in before}
    assert {name: queries[name] for name in before} == before
    assert set(new) == {name for name, row in rows.items() if row["reason"] is None}
    for name, query in new.items():
        assert (query["split"], query["task"], query["dataset"], query["pool"]) == ("train", "qa", "main", "main")
        assert (query["query"], query["targets"]) == (rows[name]["question"], [rows[name]["answer"]])
        assert query["targets"][0] in TEXTS[int(rows[name]["doc_id"].split(":")[1])]
    pairs = {(row["query_id"], row["doc_id"]) for row in artifact.read("qrels").to_pylist()}
    old = {(row["query_id"], row["doc_id"]) for row in prepare.read("qrels").to_pylist()}
    assert pairs - old == {(name, rows[name]["doc_id"]) for name in new}
    assert old <= pairs
    assert artifact.read("corpus").equals(prepare.read("corpus"))


def test_a_question_is_not_lost_to_a_twin_that_fails(tmp_path, prepare):
    """Prevents a question from being dropped as the repetition of one that is not kept; nobody is asked twice."""
    question = "Who painted the famous mill by the sea?"

    class Painter(ScriptedClient):
        def _result(self, request):
            prompt = "".join(segment.text for segment in request.segments).rpartition("Passage: ")[2]
            said = "Fowey Miller" if prompt.startswith("Fowey") else "nobody"
            result = super()._result(request)
            return result if request.temperature else dataclasses.replace(result, texts=(said,))

    for towns in (["Gorran", "Fowey"], ["Gorran", "Fowey", "Hythe"]):
        client = Painter(dict.fromkeys(towns, question))
        table = generated(config_of(tmp_path / "-".join(towns)), prepare, client).read("generated").to_pylist()
        fates = {TOWNS[int(row["doc_id"][5:])]: row["reason"] for row in table if row["question"]}
        assert fates["Fowey"] is None
        assert fates["Gorran"] in ("no_round_trip", "same_text")
        answers = [request.request_id for request in client.asked if not request.temperature]
        assert len(answers) == len(set(answers))


@pytest.mark.parametrize("demonstrations", ["clustered", "drawn"])
def test_prompts_show_training_questions_alone(tmp_path, prepare, demonstrations):
    """Prevents test questions from being shown to the LLM, and a document from being shown its own question."""
    client = ScriptedClient(SAYS)
    generated(config_of(tmp_path, demonstrations=demonstrations), prepare, client)
    assert set(client.prompts) == {f"main:{n}" for n in range(len(TOWNS))}
    for doc_id, prompt in client.prompts.items():
        shown = {
            "Who owns the harbour of Gorran?": doc_id not in ("main:6", "main:7"),
            "Where does the river Ilam end?": doc_id != "main:8",
            "Which passage answers none of these?": False,
            TEST_QUESTION: False,
            DEV_QUESTION: False,
            "add two numbers": False,
            "a secret": False,
        }
        assert {text: text in prompt for text in shown} == shown
        assert ("Passage: Gorran" in prompt) == (shown["Who owns the harbour of Gorran?"] or doc_id == "main:6")
        assert prompt.endswith(f"Passage: {TEXTS[int(doc_id.split(':')[1])]}\nQuestion:")


def test_documents_are_drawn_by_seed_and_id(tmp_path, prepare):
    """Fewer documents are the first of more; each is asked about under a seed of its own and of the run."""
    few, more = (
        [row["doc_id"] for row in drawn_documents(config_of(tmp_path, num_documents=number), "qa", prepare)]
        for number in (4, 100)
    )
    assert few == more[:4]
    assert sorted(more) == [f"main:{n}" for n in range(len(TOWNS))]
    other = dataclasses.replace(config_of(tmp_path, num_documents=4), seed=7)
    assert [row["doc_id"] for row in drawn_documents(other, "qa", prepare)] != few
    seeds = []
    for seed in (42, 7):
        client = ScriptedClient(SAYS)
        generated(config_of(tmp_path), prepare, client, seed)
        seeds += [request.seed for request in client.asked if request.temperature]
    assert len(set(seeds)) == 2 * len(TOWNS)


def test_a_plan_bounds_what_is_asked(tmp_path, prepare):
    """Prevents calls that no plan has told of: those that write, those that answer, and labels of what is kept."""
    config = config_of(tmp_path, per_document=3)
    # Of other numbers, so that none repeats another.
    says = {
        town: [f"Who owned the mill in {1000 + 10 * n + place}?" for place in range(3)] for n, town in enumerate(TOWNS)
    }
    client = ScriptedClient({town: "\n".join(questions) for town, questions in says.items()})
    generated(config, prepare, client)
    [cost] = question_costs(config)
    most = len(TOWNS) * (1 + 3)
    assert len(client.asked) == most - 3, "about one document the LLM fails"
    assert cost.pairs == most
    assert cost.tokens > sum(request.estimated_prompt_tokens for request in client.asked)
    sized = {"main": dataclasses.replace(config.datasets["main"], num_documents=4)}
    [fewer] = question_costs(dataclasses.replace(config, datasets=sized))
    assert fewer.pairs == 4 * (1 + 3)
    labelled = dataclasses.replace(config.tasks["qa"], score=TaskScore(feedback="label"))
    [more] = upper_costs(dataclasses.replace(config, datasets=sized, tasks={"qa": labelled}))
    mine = labelled.mine
    assert more.pairs == 4 * 3 * (mine.num_bm25 + mine.num_dense + 1)
    assert question_costs(config_of(tmp_path, num_documents=0)) == []


def test_without_training_questions_the_llm_is_asked_without_demonstrations(tmp_path, prepare):
    """Prevents a corpus that has no questions at all, for which generated ones matter most, from being a crash."""
    rows = {name: prepare.read(name) for name in ("queries", "corpus", "qrels")}
    bare = rows | {"qrels": rows["qrels"].slice(0, 0)}
    client = ScriptedClient({"Arden": SAYS["Arden"]})
    artifact = generated(config_of(tmp_path), make_artifact(tmp_path / "bare", "prepare", bare), client)
    assert {prompt.count("Passage:") for prompt in client.prompts.values()} == {1}
    assert artifact.manifest["counts"]["ok"] == 2
    silent = generated(config_of(tmp_path, per_document=1), prepare, ScriptedClient({}))
    assert silent.read("queries").equals(prepare.read("queries"))


def test_the_same_input_gives_the_same_bytes_and_a_kill_costs_nothing(tmp_path, prepare):
    """With a real engine: after a kill at either place nothing is asked again, and the tables are the same."""
    config = config_of(tmp_path, temperature=1.5, per_document=1, num_demonstrations=0)
    folder = save_model(tmp_path / "llm")
    name = scorer_id(LLM.fingerprint, config.llm)
    engine = open_engine(EngineSettings.of(config, folder))
    client = LocalClient(name, LLMStore(tmp_path / "store", cache_bytes=0), engine)
    artifact = generated(config, prepare, client)
    told, written, paid = artifact.require(), files(artifact), client.usage.computed_tokens
    assert paid
    assert {row["reason"] for row in artifact.read("generated").to_pylist()} != {"not_written"}

    (artifact.path / "manifest.json").unlink()
    assert generated(config, prepare, client).require() | {"seconds": 0} == told | {"seconds": 0}

    (artifact.path / "manifest.json").unlink()
    (artifact.path / "_ledger" / "00001.json").unlink()
    assert files(generated(config, prepare, client)) == written
    assert client.usage.computed_tokens == paid

    anew = LocalClient(name, LLMStore(tmp_path / "other"), engine)
    moved = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, artifact_root=str(tmp_path / "b")))
    again = generated(moved, prepare, anew)
    assert again.id == artifact.id
    assert files(again) == written


def test_a_generated_question_s_passage_is_its_candidate(tmp_path, prepare):
    """Without gold candidates its source may not be found, and then nothing would answer it."""
    config = config_of(tmp_path)
    artifact = generated(config, prepare, ScriptedClient(SAYS))
    corpus, queries = artifact.read("corpus"), artifact.read("queries")
    train = [row for row in queries.to_pylist() if row["split"] == "train" and row["task"] == "qa"]
    [document_ND, query_QD] = vectors("qa", [("document", corpus["text"].to_pylist()), ("query", ["x"] * len(queries))])
    embeddings = make_artifact(
        tmp_path,
        "embed",
        {
            "document_embeddings": to_table("doc_id", corpus["doc_id"], document_ND),
            "query_embeddings": to_table("query_id", queries["query_id"], query_QD),
        },
    )
    index = Artifact(tmp_path, index_spec(config, embeddings))
    index.begin()
    IndexWorker(index, embeddings, [0, corpus.num_rows]).run(0)
    index.commit(1, seconds=0, extra={"cuts": [0, corpus.num_rows]})
    tasks = {"qa": TaskMine(with_gold=False, num_bm25=0, num_dense=2), "tool": TaskMine()}
    mined = Artifact(tmp_path, dataclasses.replace(index_spec(config, embeddings), stage="mine"))
    mined.begin()
    MineWorker(mined, artifact, embeddings, index, tasks, BM25Config(), seed=1, how=Opening()).run(0)
    mined.commit(1, seconds=0)
    certain = {
        row["query_id"]: row["doc_id"] for row in mined.read("candidates").to_pylist() if row["source"] == "gold"
    }
    source = {row["query_id"]: json.loads(row["meta"])["source_doc_id"] for row in train if row["meta"]}
    assert source
    assert certain == source
