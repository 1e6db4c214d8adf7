"""Judging answers in words."""

import itertools

import pytest

from llmr_ray.evaluation.answers import exact_match, normalize, rouge_l, token_f1


def test_an_alias_inside_the_output_is_no_exact_match():
    """The released PopQA code counts a substring as an exact match (methods.md I.20)."""
    assert exact_match("He was a politician from Paris", ["politician"]) == 0.0
    assert exact_match("The Politician.", ["singer", "politician"]) == 1.0


def test_normalisation_is_squads():
    """Another normalisation gives figures that compare with nobody's."""
    assert normalize("  The  U.S.A. is a\tcountry! ") == "usa is country"
    assert normalize("an apple, theory") == "apple theory"


@pytest.mark.parametrize(
    ("output", "answers", "expected"),
    [
        ("the cat sat", ["cat sat down"], 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),
        ("dog", ["cat"], 0.0),
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),
        ("dog", ["cat", "dog"], 1.0),
    ],
)
def test_token_f1_counts_each_token_once_per_occurrence(output, answers, expected):
    """A set instead of a bag rewards repeating the answer; forgetting aliases punishes a right one."""
    assert token_f1(output, answers) == pytest.approx(expected)


def longest_common_subsequence(left, right):
    best = 0
    for size in range(1, len(left) + 1):
        for chosen in itertools.combinations(left, size):
            rest = iter(right)
            if all(word in rest for word in chosen):
                best = size
    return best


def test_rouge_l_equals_a_brute_force_subsequence():
    """ROUGE-N or a stemmed variant in its place would not show in a plausible figure."""
    output, answer = "a red fox jumps over dogs", "the red fox quickly jumps over lazy dogs"
    common = longest_common_subsequence(output.split(), answer.split())
    precision, recall = common / 6, common / 8
    assert rouge_l(output, ["unrelated words", answer]) == pytest.approx(2 * precision * recall / (precision + recall))
