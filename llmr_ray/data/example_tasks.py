"""The tasks of in-context learning as one table: what is asked, what may be answered, how answers are judged.

The thirty data sets of LLM-R in nine categories (methods.md B.2, templates of the released code: the first of each),
and those that the sample packages hold. A data set of the task icl has the properties of the entry with its name; one
without an entry is judged by accuracy where it has options, else by ROUGE-L.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ExampleTask:
    """One task.

    template: with the fields of a raw row in braces. metric: accuracy, F1 (of `positive_label`), EM or ROUGE-L. labels:
    the answer is one of these words, in the order of the raw label numbers. positive_label: F1 is reported for it, also
    beside accuracy. normalization: of EM in LLM-R's protocol, squad or trivia_qa. is_test_only: it has no training
    split, and its rows are no examples of the pool. pool: the task whose examples are of its kind, where that is
    another one.

    Raw rows are left out when a field of `max_words` has more words, when a field or an output matches `bad_text`, or
    when there are not `num_options` options (0: any number).
    """

    category: str
    template: str
    metric: str = "accuracy"
    labels: tuple[str, ...] = ()
    positive_label: str = ""
    normalization: str = "squad"
    is_test_only: bool = False
    pool: str = ""
    max_words: dict[str, int] = field(default_factory=dict)
    bad_text: str = ""
    num_options: int = 0

    @property
    def kind(self) -> str:
        """labels (one of a few fixed words), choice (one of the row's own options) or free."""
        if self.labels:
            return "labels"
        return "choice" if self.metric == "accuracy" else "free"


def owner_of(meta: str | None) -> str | None:
    """The data set that a document is an example of, from the `meta` of its row of `corpus`; None: of none."""
    owner: str | None = json.loads(meta or "{}").get("dataset")
    return owner


def owners(metas: Iterable[str | None]) -> list[str | None]:
    """`owner_of` each document, from the column `meta` of `corpus`."""
    return [owner_of(meta) for meta in metas]


def pool_of(dataset: str) -> str:
    """The data set whose examples are of a data set's kind: itself, but for tests of another one's training."""
    task = TASKS.get(dataset)
    return task.pool if task is not None and task.pool else dataset


_NO_YES = ("No", "Yes")
_YES_NO = ("Yes", "No")
_ENTAILMENT = ("Yes", "Maybe", "No")
_SENTIMENT = ("Negative", "Positive")
_MNLI = 'Premise: "{premise}" Hypothesis: "{hypothesis}" Does the premise entail the hypothesis? Yes, No, or Maybe?'

_LLM_R = {
    "aeslc": ExampleTask(
        category="Summarize",
        template="What is the subject line for this email? {body}",
        metric="ROUGE-L",
        max_words={"body": 256},
    ),
    "ag_news": ExampleTask(
        category="Summarize",
        template='"{text}" What is this text about? World, Sports, Business, or Technology?',
        labels=("World", "Sports", "Business", "Technology"),
    ),
    "gigaword": ExampleTask(
        category="Summarize",
        template="Write a short summary for this text: {text}",
        metric="ROUGE-L",
        bad_text=r"UNK|#",
    ),
    "arc_c": ExampleTask(category="Close QA", template="{question}", num_options=4),
    "arc_e": ExampleTask(category="Close QA", template="{question}", num_options=4),
    "natural_questions": ExampleTask(
        category="Close QA", template="Question: {question}? Answer:", metric="EM", normalization="trivia_qa"
    ),
    "boolq": ExampleTask(category="Reading", template="{text} Can we conclude that {question}?", labels=_NO_YES),
    "multirc": ExampleTask(
        category="Reading",
        template='{paragraph} Question: "{question}" Response: "{response}" Does the response correctly answer the '
        "question?",
        metric="F1",
        labels=_NO_YES,
        positive_label="Yes",
    ),
    "openbookqa": ExampleTask(category="Reading", template="{fact} {question}"),
    "squad_v1": ExampleTask(
        category="Reading",
        template="Please answer a question about the following article about {title}: {context} {question}",
        metric="EM",
    ),
    "common_gen": ExampleTask(
        category="Data2text",
        template="Concepts: {concepts}. Write a sentence that includes all these words.",
        metric="ROUGE-L",
    ),
    "dart": ExampleTask(
        category="Data2text",
        template="Triple: {tripleset} What is a sentence that describes this triple?",
        metric="ROUGE-L",
    ),
    "e2e_nlg": ExampleTask(
        category="Data2text",
        template="Attributes: {mr}. Produce a detailed sentence about this restaurant.",
        metric="ROUGE-L",
    ),
    "copa": ExampleTask(category="Commonsense", template='"{premise}" What is the {question}?'),
    "hellaswag": ExampleTask(category="Commonsense", template="What happens next in this paragraph? {context}"),
    "piqa": ExampleTask(
        category="Commonsense",
        template='Here is a goal: "{goal}" How would you accomplish this goal?',
    ),
    # An option is the candidate with the rest of the sentence.
    "winogrande": ExampleTask(category="Coreference", template="How does the sentence end? {context}"),
    "wsc": ExampleTask(
        category="Coreference", template='{context} Are "{text1}" and "{text2}" the same entity?', labels=_NO_YES
    ),
    "wsc273": ExampleTask(category="Coreference", template="{context}", is_test_only=True),
    "mnli": ExampleTask(category="NLI", template=_MNLI, labels=_ENTAILMENT),
    "mnli_m": ExampleTask(category="NLI", template=_MNLI, labels=_ENTAILMENT, is_test_only=True, pool="mnli"),
    "mnli_mm": ExampleTask(category="NLI", template=_MNLI, labels=_ENTAILMENT, is_test_only=True, pool="mnli"),
    "qnli": ExampleTask(
        category="NLI",
        template='Does the sentence "{sentence}" answer the question "{question}"?',
        labels=_YES_NO,
    ),
    "rte": ExampleTask(
        category="NLI",
        template='{premise} Based on the paragraph above can we conclude that "{hypothesis}"? Yes or No?',
        labels=_YES_NO,
    ),
    "snli": ExampleTask(
        category="NLI",
        template='If "{premise}", does this mean that "{hypothesis}"? Yes, No, or Maybe?',
        labels=_ENTAILMENT,
    ),
    "mrpc": ExampleTask(
        category="Paraphrase",
        template="Here are two sentences: {sentence1} {sentence2} Do they have the same meaning?",
        labels=_NO_YES,
        positive_label="Yes",
    ),
    "paws": ExampleTask(
        category="Paraphrase",
        template="{sentence1} {sentence2} Do these sentences mean the same thing?",
        labels=_NO_YES,
    ),
    "qqp": ExampleTask(
        category="Paraphrase",
        template='"{question1}" "{question2}" Would you say that these questions are the same?',
        labels=_NO_YES,
        positive_label="Yes",
    ),
    "sentiment140": ExampleTask(
        category="Sentiment", template="{text} What is the sentiment of this tweet?", labels=_SENTIMENT
    ),
    "sst2": ExampleTask(
        category="Sentiment",
        template='Review: "{sentence}" Is this movie review sentence negative or positive?',
        labels=_SENTIMENT,
    ),
    "yelp": ExampleTask(
        category="Sentiment",
        template="{text} Is this review positive or negative?",
        labels=_SENTIMENT,
        max_words={"text": 256},
    ),
}

# What the sample packages hold besides (data/examples.py).
_SAMPLES = {
    "rotten_tomatoes": ExampleTask(
        category="Sentiment",
        template='Review: "{text}" Is this movie review sentence negative or positive?',
        labels=_SENTIMENT,
    ),
    "sarcasm": ExampleTask(
        category="Sentiment", template='Headline: "{headline}" Is this headline sarcastic?', labels=_NO_YES
    ),
    "subjectivity": ExampleTask(
        category="Sentiment",
        template='"{text}" Does this sentence tell the plot of a movie or an opinion of it?',
        labels=("Plot", "Opinion"),
    ),
    "siqa": ExampleTask(category="Commonsense", template="{passage} {question}"),
    "commonsenseqa": ExampleTask(category="Commonsense", template="{question}"),
    "disambiguation_qa": ExampleTask(category="Coreference", template="{question} What does the pronoun refer to?"),
    # Judged as SQuAD in both protocols: the same answers have the same figure, and LLM-R has none for it.
    "nq_open": ExampleTask(category="Close QA", template="Question: {question}? Answer:", metric="EM"),
    "mmlu": ExampleTask(category="Close QA", template="{question}"),
    "asdiv": ExampleTask(category="Close QA", template="{passage} {question}", metric="EM"),
    "logiqa": ExampleTask(category="Reading", template="{passage} {question}", max_words={"passage": 150}),
    "disfl_qa": ExampleTask(
        category="Reading", template="{passage} {question}", metric="ROUGE-L", max_words={"passage": 150}
    ),
    "privacy_policy": ExampleTask(
        category="NLI", template='Does the text "{context}" answer the question "{question}"?', labels=_NO_YES
    ),
    "xsum": ExampleTask(
        category="Summarize",
        template="Write a short summary for this text: {document}",
        metric="ROUGE-L",
        max_words={"document": 150},
    ),
}

TASKS: dict[str, ExampleTask] = _LLM_R | _SAMPLES
