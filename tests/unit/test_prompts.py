"""Feedback prompts against the templates written out by hand."""

import pytest

from llmr_ray.errors import ConfigError
from llmr_ray.feedback.prompts import feedback_segments, target_text

QUERY = {"query": " who wrote it?\n", "context": "def f():\n    "}
DOCUMENT = {"text": "  Title. A passage. ", "continuation": None}


def joined(task, document, target, query=QUERY):
    return "".join(s.text for s in feedback_segments(task, query, document)) + target_text(task, target)


@pytest.mark.parametrize(
    ("task", "with_document", "without"),
    [
        (
            "qa",
            "Knowledge: Title. A passage.\n\nQuestion: who wrote it?\n\nAnswer: me",
            "Question: who wrote it?\n\nAnswer: me",
        ),
        (
            "convsearch",
            "Knowledge: Title. A passage.\n\nQuestion: who wrote it?\n\nAnswer: me",
            "Question: who wrote it?\n\nAnswer: me",
        ),
        ("icl", "Title. A passage.\nwho wrote it?\nme", "who wrote it?\nme"),
        (
            "chat",
            "Title. A passage.\nSpeaker 1: who wrote it?\nSpeaker 2: me",
            "Speaker 1: who wrote it?\nSpeaker 2: me",
        ),
    ],
)
def test_joint_text_is_the_template(task, with_document, without):
    """A template off by one space or newline changes every log-probability and nobody notices."""
    assert joined(task, DOCUMENT, " me ") == with_document
    assert joined(task, None, " me ") == without


def test_long_range_text_keeps_its_white_space():
    """Stripping code chunks would score a text that never existed."""
    query = {"query": "    x = 1\n", "context": "def f():\n"}
    document = {"text": "import os\n", "continuation": "import re\n"}
    assert joined("lrlm", document, "    return x\n", query) == (
        "import os\nimport re\ndef f():\n    x = 1\n    return x\n"
    )
    assert joined("lrlm", None, "    y", {"query": "a\n", "context": None}) == "a\n    y"


@pytest.mark.parametrize("task", ["qa", "convsearch", "icl", "chat", "lrlm"])
def test_candidate_is_cut_first_then_context_then_query(task):
    """Cutting the question before the candidate makes the LLM answer something else."""
    segments = feedback_segments(task, QUERY, DOCUMENT, max_candidate_tokens=7)
    order = [s for s in sorted(segments, key=lambda s: s.trim_order) if s.trim_order]
    assert order[0].text.strip() == DOCUMENT["text"].strip()
    assert (order[0].max_tokens, order[0].trim_side) == (7, "left" if task == "icl" else "right")
    assert order[-1].text.strip() == "who wrote it?"
    assert order[-1].trim_side == "left"


def test_tools_have_no_prompt():
    """Scoring tools would pay for numbers that no loss uses."""
    with pytest.raises(ConfigError, match="tool"):
        feedback_segments("tool", QUERY, DOCUMENT)
