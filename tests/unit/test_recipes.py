"""The recipes of AAR, API-Retriever, REPLUG and Atlas give the losses of their papers (methods.md D to F)."""

import math
from pathlib import Path

import pytest
import torch

from llmr_ray import loading
from llmr_ray.training.objective import TERMS, Scored
from llmr_ray.training.stage import training_tasks

CONF = Path(__file__).parents[2] / "conf"


def recipe(name, *overrides):
    config = loading.load(CONF / f"{name}.yaml", list(overrides))
    (train,) = (task.train for task in training_tasks(config).values())
    return config, train


def loss(config, train, cosine_BC, own_BG, rewards_BG, positive_BG=None):
    """The recipe's weighted terms for queries whose documents are all of different texts."""
    num_queries, group_size = own_BG.shape
    others_BC = torch.ones_like(cosine_BC, dtype=torch.bool).scatter(1, own_BG, False)
    scored = Scored(
        sim_BC=cosine_BC / config.train.temperature,
        own_BG=own_BG,
        rewards_BG=rewards_BG,
        weights_BG=torch.ones_like(rewards_BG),
        positive_BG=positive_BG,
        same_BGG=torch.eye(group_size, dtype=torch.bool).expand(num_queries, -1, -1),
        others_BC=others_BC,
    )
    weights = {setting: getattr(train, setting) for setting in TERMS}
    return sum(weight * TERMS[setting](scored, train) for setting, weight in weights.items() if weight)


def softmax(values):
    values = [math.exp(value - max(values)) for value in values]
    return [value / sum(values) for value in values]


def test_replug_is_its_formula():
    """Prevents the released code's direction, and logs where the formula has probabilities (worked numbers of F)."""
    config, train = recipe("replug")
    cosines, likelihoods = torch.tensor([[0.9, 0.7, 0.5]]), torch.tensor([[0.30, 0.25, 0.10]])
    found = loss(config, train, cosines, torch.tensor([[0, 1, 2]]), likelihoods.log())
    assert found.item() == pytest.approx(0.204307, abs=1e-6)
    assert config.evaluate.reading == "vote"


def test_atlas_distils_perplexities():
    """Prevents a teacher at another temperature, or a KL of the other direction."""
    config, train = recipe("atlas")
    cosines, rewards = [0.4, 0.5, 0.45, 0.1], [-1.23, -1.20, -1.25, -1.31]
    teacher = softmax([reward / 0.01 for reward in rewards])
    student = softmax([cosine / config.train.temperature for cosine in cosines])
    expected = sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True))
    own = torch.arange(4)[None]
    found = loss(config, train, torch.tensor([cosines]), own, torch.tensor([rewards]))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_atlas_as_emdr2():
    """Prevents the note in the recipe from naming settings that give another loss."""
    note = (CONF / "atlas.yaml").read_text().split("EMDR2: ")[1].split(". It takes")[0]
    config, train = recipe("atlas", *note.replace("\n#", "").split())
    cosines, logs = [0.4, 0.5, 0.1], [-3.0, -2.5, -6.0]
    student = softmax([cosine / config.train.temperature for cosine in cosines])
    expected = -math.log(sum(s * math.exp(log) for s, log in zip(student, logs, strict=True)))
    found = loss(config, train, torch.tensor([cosines]), torch.arange(3)[None], torch.tensor([logs]))
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert (config.name, config.tasks["qa"].score.normalization) == ("emdr2", "sum")


def test_aar_sets_each_positive_against_what_is_none():
    """Prevents positives from pushing each other away: the loop of the released code, over all documents of a batch."""
    config, train = recipe("aar")
    torch.manual_seed(0)
    cosine_BC = torch.rand(2, 10)
    own_BG = torch.arange(10).view(2, 5)
    positive_BG = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])
    found = loss(config, train, cosine_BC, own_BG, torch.zeros(2, 5), positive_BG)
    for query, positives in enumerate([[0, 1, 2], [5, 6]]):
        each = []
        for positive in positives:
            kept = [positive, *(column for column in range(10) if column not in positives)]
            each.append(-math.log(softmax([cosine_BC[query, c].item() / config.train.temperature for c in kept])[0]))
        assert found[query].item() == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert (train.positive, train.num_preferred, config.tasks["qa"].score.num_first) == ("gold_and_teacher", 2, 10)


def test_api_retriever_multiplies_cosines_by_twenty():
    """Prevents another loss than MultipleNegativesRankingLoss's over the batch."""
    config, train = recipe("api_retriever")
    cosine_BC = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.4, 0.8, 0.1]])
    found = loss(config, train, cosine_BC, torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 2))
    expected = torch.nn.functional.cross_entropy(20 * cosine_BC, torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(found, expected)
    assert config.tasks["tool"].score.feedback == "none"
