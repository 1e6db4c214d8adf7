"""The table of tasks is LLM-R's: what is asked, what may be answered, how answers are judged (methods.md B.2)."""

from pathlib import Path

import pytest

from llmr_ray import loading
from llmr_ray.data.example_tasks import TASKS, pool_of
from llmr_ray.evaluation.results import held_out_tasks

CONF = Path(__file__).parents[2] / "conf"

# Copied from methods.md B.2 by hand: template (its fields have the code's names), labels or type, metric, category.
MNLI = (
    'Premise: "{premise}" Hypothesis: "{hypothesis}" Does the premise entail the hypothesis? Yes, No, or Maybe?',
    "Yes, Maybe, No",
    "acc",
    "NLI",
)
PUBLISHED = {
    "aeslc": ("What is the subject line for this email? {body}", "generate", "ROUGE-L", "Summarize"),
    "ag_news": (
        '"{text}" What is this text about? World, Sports, Business, or Technology?',
        "World, Sports, Business, Technology",
        "acc",
        "Summarize",
    ),
    "gigaword": ("Write a short summary for this text: {text}", "generate", "ROUGE-L", "Summarize"),
    "arc_c": ("{question}", "multi-choice", "acc", "Close QA"),
    "arc_e": ("{question}", "multi-choice", "acc", "Close QA"),
    "natural_questions": ("Question: {question}? Answer:", "generate", "EM", "Close QA"),
    "boolq": ("{text} Can we conclude that {question}?", "No, Yes", "acc", "Reading"),
    "multirc": (
        '{paragraph} Question: "{question}" Response: "{response}" Does the response correctly answer the question?',
        "No, Yes",
        "F1 (positive Yes)",
        "Reading",
    ),
    "openbookqa": ("{fact} {question}", "multi-choice", "acc", "Reading"),
    "squad_v1": (
        "Please answer a question about the following article about {title}: {context} {question}",
        "generate",
        "EM",
        "Reading",
    ),
    "common_gen": (
        "Concepts: {concepts}. Write a sentence that includes all these words.",
        "generate",
        "ROUGE-L",
        "Data2text",
    ),
    "dart": ("Triple: {tripleset} What is a sentence that describes this triple?", "generate", "ROUGE-L", "Data2text"),
    "e2e_nlg": (
        "Attributes: {mr}. Produce a detailed sentence about this restaurant.",
        "generate",
        "ROUGE-L",
        "Data2text",
    ),
    "copa": ('"{premise}" What is the {question}?', "multi-choice", "acc", "Commonsense"),
    "hellaswag": ("What happens next in this paragraph? {context}", "multi-choice", "acc", "Commonsense"),
    "piqa": (
        'Here is a goal: "{goal}" How would you accomplish this goal?',
        "multi-choice",
        "acc",
        "Commonsense (held out)",
    ),
    "winogrande": ("How does the sentence end? {context}", "multi-choice", "acc", "Coreference"),
    "wsc": ('{context} Are "{text1}" and "{text2}" the same entity?', "No, Yes", "acc", "Coreference"),
    "wsc273": ("{context}", "multi-choice", "acc", "Coreference (held out)"),
    "mnli_m": MNLI,
    "mnli_mm": MNLI,
    "qnli": (
        'Does the sentence "{sentence}" answer the question "{question}"?',
        "Yes, No",
        "acc",
        "NLI (held out)",
    ),
    "rte": (
        '{premise} Based on the paragraph above can we conclude that "{hypothesis}"? Yes or No?',
        "Yes, No",
        "acc",
        "NLI",
    ),
    "snli": (
        'If "{premise}", does this mean that "{hypothesis}"? Yes, No, or Maybe?',
        "Yes, Maybe, No",
        "acc",
        "NLI",
    ),
    "mrpc": (
        "Here are two sentences: {sentence1} {sentence2} Do they have the same meaning?",
        "No, Yes",
        "acc (code also F1)",
        "Paraphrase",
    ),
    "paws": ("{sentence1} {sentence2} Do these sentences mean the same thing?", "No, Yes", "acc", "Paraphrase"),
    "qqp": (
        '"{question1}" "{question2}" Would you say that these questions are the same?',
        "No, Yes",
        "acc (code also F1)",
        "Paraphrase",
    ),
    "sentiment140": ("{text} What is the sentiment of this tweet?", "Negative, Positive", "acc", "Sentiment"),
    "sst2": (
        'Review: "{sentence}" Is this movie review sentence negative or positive?',
        "Negative, Positive",
        "acc",
        "Sentiment",
    ),
    "yelp": (
        "{text} Is this review positive or negative?",
        "Negative, Positive",
        "acc",
        "Sentiment (held out)",
    ),
}
METRICS = {
    "acc": ("accuracy", ""),
    "acc (code also F1)": ("accuracy", "Yes"),
    "F1 (positive Yes)": ("F1", "Yes"),
    "EM": ("EM", ""),
    "ROUGE-L": ("ROUGE-L", ""),
}
KINDS = {"generate": "free", "multi-choice": "choice"}
HELD_OUT = " (held out)"


@pytest.mark.parametrize("name", [*PUBLISHED, "mnli"])
def test_a_task_is_as_published(name: str) -> None:
    """One word of a template, or two labels that changed places, make another task under the published name."""
    template, labels, metric, category = PUBLISHED.get(name, MNLI)
    task = TASKS[name]
    assert task.template == template
    assert task.kind == KINDS.get(labels, "labels")
    assert task.labels == (() if labels in KINDS else tuple(labels.split(", ")))
    assert (task.metric, task.positive_label) == METRICS[metric]
    assert task.category == category.removesuffix(HELD_OUT)


def test_the_thirty_sets_of_nine_categories() -> None:
    """mnli is tested as two, whose examples are mnli's; the paper's configuration trains on none that is held out."""
    assert len(PUBLISHED) == 30
    assert len({category.removesuffix(HELD_OUT) for *_, category in PUBLISHED.values()}) == 9
    held_out = {name for name, (*_, category) in PUBLISHED.items() if category.endswith(HELD_OUT)}
    assert held_out_tasks(loading.load(CONF / "paper" / "llm_r_tasks.yaml")) == held_out
    # Those without a training split.
    assert {name for name, task in TASKS.items() if task.is_test_only} == {"wsc273", "mnli_m", "mnli_mm"}
    own = {name: pool_of(name) for name in PUBLISHED if pool_of(name) != name}
    assert own == {"mnli_m": "mnli", "mnli_mm": "mnli"}
    assert pool_of("unknown") == "unknown"


def test_rows_that_are_left_out_and_answers_that_are_alike() -> None:
    """A filter that is lost or gained changes which rows a published figure is about; so does another normalisation."""
    published = {name: TASKS[name] for name in PUBLISHED}
    words = {name: task.max_words for name, task in published.items() if task.max_words}
    assert words == {"aeslc": {"body": 256}, "yelp": {"text": 256}}
    # B.2 says it of arc_c alone, the released code filters both.
    assert {name: task.num_options for name, task in published.items() if task.num_options} == {"arc_c": 4, "arc_e": 4}
    assert {name: task.bad_text for name, task in published.items() if task.bad_text} == {"gigaword": "UNK|#"}
    assert {name for name, task in published.items() if task.normalization != "squad"} == {"natural_questions"}


def test_labels_can_be_told_apart() -> None:
    """Constrained decoding tells labels apart by their first token (evaluation/examples.py)."""
    for task in TASKS.values():
        assert not task.positive_label or task.positive_label in task.labels
        assert len({label.encode()[0] for label in task.labels}) == len(task.labels)
