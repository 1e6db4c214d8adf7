"""What training's speed is computed from."""

import pytest
import torch

from llmr_ray.training.speed import body_parameters, gemm_flops, summary


def test_summary_counts_tokens_that_are_no_padding():
    """Prevents a first step that waits for memory, or padding, from counting as speed."""
    steps = [
        {"num_tokens": 100, "padding_fraction": 0.0, "seconds": 60.0},
        {"num_tokens": 100, "padding_fraction": 0.5, "seconds": 1.0},
        {"num_tokens": 300, "padding_fraction": 0.25, "seconds": 3.0},
    ]
    found = summary(steps, num_parameters=1000, peak_flops=6e6)
    assert found["tokens_per_second"] == pytest.approx(100)
    assert found["padding_fraction"] == pytest.approx(1 - 400 / (200 + 400))
    assert found["peak_fraction"] == pytest.approx(0.1)


def test_embedding_tables_multiply_nothing():
    """A table of a million words would make a small model look fast."""
    module = torch.nn.Sequential(torch.nn.Embedding(1000, 8), torch.nn.Linear(8, 16), torch.nn.LayerNorm(16))
    assert body_parameters(module) == 8 * 16


def test_peak_is_within_reason():
    """Prevents a unit lost on the way: no processor does less than a hundred million operations a second."""
    assert 1e8 < gemm_flops(torch.device("cpu"), torch.float32) < 1e15
