"""The released code's defects as settings: each with a number that was worked out, and off by default."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmr_ray import loading
from llmr_ray.config import Config, identity
from llmr_ray.evaluation import examples, knowledge
from llmr_ray.evaluation.answers import alias_inside, exact_match
from llmr_ray.feedback.requests import LLMResult
from llmr_ray.task_config import TaskTrain
from llmr_ray.training.objective import LocalBatch, batch_loss, term_weights

CONF = Path(__file__).parents[2] / "conf"


def two_queries(others_BC=None, same_BGG=None):
    """Two queries of two documents; the second document of each query has the text of the other's first."""
    return LocalBatch(
        dataset="a",
        epoch=0,
        first=0,
        texts=np.arange(5),
        query_B=np.asarray([0, 1]),
        doc_BG=np.asarray([[2, 3], [3, 4]]),
        rewards_BG=np.asarray([[0.0, 0.0], [0.0, 0.0]], np.float32),
        weights_BG=np.ones((2, 2), np.float32),
        has_rewards_B=np.ones(2, bool),
        positive_BG=np.asarray([[True, False]] * 2),
        same_BGG=np.broadcast_to(np.eye(2, dtype=bool), (2, 2, 2)).copy() if same_BGG is None else same_BGG,
        others_BC=np.asarray([[0, 0, 1, 1], [1, 1, 0, 0]], bool) if others_BC is None else others_BC,
        peers_BN=None,
        tasks_B=["a", "a"],
    )


def loss(task, batch=None, **settings):
    query_BD, doc_BGD = torch.zeros(2, 3), torch.zeros(2, 2, 3)
    return float(batch_loss(query_BD, doc_BGD, batch or two_queries(), tasks={"a": task}, temperature=1.0, **settings))


def test_the_gather_without_gradient_weakens_what_is_gathered_alone():
    """Released: on Z GPUs the contrastive and graded losses weigh 1/Z beside the KL, so the mix depends on Z."""
    contrastive, both = TaskTrain(contrastive_weight=1.0), TaskTrain(contrastive_weight=1.0, marginal_weight=1.0)
    # All similarities are 0: -log of 1/4. The marginal likelihood of rewards 0 is 1, so its loss is 0.
    assert loss(contrastive) == pytest.approx(np.log(4))
    assert loss(contrastive, gather_devices=8) == pytest.approx(np.log(4) / 8)
    assert term_weights(both, 8) == {"contrastive_weight": 0.125, "marginal_weight": 1.0}


def test_a_lone_weight_can_be_ignored():
    """Released: distill_weight counts only beside a contrastive loss."""
    alone = TaskTrain(graded_weight=0.2, lone_weight="ignored")
    beside = TaskTrain(graded_weight=0.2, contrastive_weight=0.5, lone_weight="ignored")
    assert term_weights(alone) == {"graded_weight": 1.0}
    assert term_weights(beside) == {"graded_weight": 0.2, "contrastive_weight": 0.5}
    assert term_weights(TaskTrain(graded_weight=0.2)) == {"graded_weight": 0.2}


def test_a_false_negative_counts_where_it_is_kept():
    """With the text of the other's first document masked there are 3 candidates, else 4."""
    others = np.asarray([[0, 0, 0, 1], [1, 0, 0, 0]], bool)
    task = TaskTrain(contrastive_weight=1.0)
    assert loss(task, two_queries(others_BC=others)) == pytest.approx(np.log(3))
    assert loss(task) == pytest.approx(np.log(4))


def test_an_alias_anywhere_in_the_answer_can_count():
    """Released: PopQA's exact match is a substring of the output, raw, in lower case or capitalised."""
    output, answers = "He was born in New Yorkshire.", ["new york", "NYC"]
    assert (exact_match(output, answers), alias_inside(output, answers)) == (0.0, 0.0)
    assert alias_inside(output, ["New York"]) == 1.0
    assert alias_inside("paris, of course", ["Paris"]) == 1.0
    assert alias_inside("Painter", ["painter"]) == 1.0
    query = {"targets": ["New York"], "query_id": "q", "options": None}
    result = LLMResult(request_id="q", texts=(output,))
    judged = [knowledge.judge(query, result, match=match).values["EM"] for match in ("exact", "alias_inside")]
    assert judged == [0.0, 1.0]


def test_the_most_similar_demonstration_can_be_cut_first():
    """Released: a prompt that is too long keeps the head of the reversed list, the least similar ones."""
    query = {"query_id": "q", "query": "in", "task": "icl", "dataset": "x", "options": None, "targets": ["out"]}
    shown = [{"title": None, "text": text, "continuation": None} for text in ("best", "second", "third")]
    orders = {}
    for cut in ("least_similar", "most_similar"):
        asked = examples.request("q", query, shown, demonstration_tokens=0, max_new_tokens=4, cut=cut)
        orders[cut] = {segment.text: segment.trim_order for segment in asked.segments if segment.text in
                       ("best", "second", "third")}  # fmt: skip
    assert orders["least_similar"] == {"third": 1, "second": 2, "best": 3}
    assert orders["most_similar"] == {"third": 3, "second": 2, "best": 1}


def test_corrected_is_the_default_and_changes_no_id():
    """Prevents artifacts that exist from being made again because switches came."""
    told = identity(Config())
    assert not {"sampling", "false_negatives", "gather_devices", "seed", "instructions", "order"} & told["train"].keys()
    assert not {"answer_match", "icl_cut"} & told["evaluate"].keys()
    assert "lone_weight" not in identity(TaskTrain())


def test_the_preset_turns_all_of_them_on():
    released = loading.load(CONF / "paper" / "llm_embedder_released.yaml")
    train, evaluate = released.train, released.evaluate
    assert (train.gather_devices, train.sampling, train.false_negatives) == (8, "once", "kept")
    assert (evaluate.answer_match, evaluate.icl_cut) == ("alias_inside", "most_similar")
    assert {released.tasks[name].train.lone_weight for name in ("qa", "chat", "lrlm", "icl")} == {"ignored"}
    assert (released.train.warmup_fraction, released.train.self_paced) == (0.1, False)
    assert (released.bm25.k1, released.bm25.b) == (0.82, 0.68)
