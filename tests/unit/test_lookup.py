"""One lookup for all passes of a step: the same embeddings and the same gradient as a lookup for each."""

import numpy as np
import pytest
import torch

from llmr_ray.modeling.lookup import one_lookup

TEXTS = [np.asarray(ids) for ids in ([5, 7, 7, 2], [3], [7, 0, 9], [5, 5])]


def gradient(module, texts, *, at_once):
    """(embeddings, gradient) of a sum over the texts that weighs each token differently."""
    module.zero_grad()
    if at_once:
        with one_lookup(module, texts, pad_id=1):
            embedded = [module(torch.from_numpy(ids)) for ids in texts]
    else:
        embedded = [module(torch.from_numpy(ids)) for ids in texts]
    weights = torch.linspace(-1, 2, sum(len(ids) for ids in texts))[:, None]
    (torch.cat(embedded).square() * weights).sum().backward()
    return torch.cat(embedded).detach(), module.weight.grad


@pytest.mark.parametrize("padding", [None, 0, 1, 8])
def test_gradient_is_that_of_a_lookup_for_each_text(padding):
    """Prevents rows of other tokens from being trained, and the padding token's row from moving."""
    torch.manual_seed(0)
    module = torch.nn.Embedding(12, 4, padding_idx=padding)
    expected, expected_gradient = gradient(module, TEXTS, at_once=False)
    got, got_gradient = gradient(module, TEXTS, at_once=True)
    assert torch.equal(got, expected)
    torch.testing.assert_close(got_gradient, expected_gradient)
    assert "forward" not in vars(module)


def test_an_error_within_leaves_the_module_as_it_was():
    module = torch.nn.Embedding(12, 4)
    with pytest.raises(RuntimeError, match="stop"), one_lookup(module, TEXTS, pad_id=1):
        raise RuntimeError("stop")
    assert "forward" not in vars(module)


@pytest.mark.parametrize("change", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_depends_on_the_whole_batch_is_left_alone(change):
    """Such a module would count or clip differently; it must keep its own lookup."""
    module = torch.nn.Embedding(12, 4, **change)
    with one_lookup(module, TEXTS, pad_id=1):
        assert "forward" not in vars(module)


def test_without_a_gradient_nothing_is_gained_and_nothing_changed():
    module = torch.nn.Embedding(12, 4)
    with torch.no_grad(), one_lookup(module, TEXTS, pad_id=1):
        assert "forward" not in vars(module)
