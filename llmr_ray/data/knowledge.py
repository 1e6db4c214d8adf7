"""Readers of question answering over passages: HotpotQA (distractor) and SQuAD 2.0, as their makers publish them.

A passage's text begins with its title, so that embedder, BM25 and LLM read the same (methods.md A.7, "{title} {text}").
"""

from collections.abc import Iterator
from typing import Any

from llmr_ray.artifacts import sha256_text
from llmr_ray.data.records import BadRow, Document, Query, Record, Skip, Source, check_text, one_line, read_json
from llmr_ray.data.text import document_text
from llmr_ray.errors import DataError


def read_hotpotqa(source: Source) -> Iterator[Record]:
    """HotpotQA: ten paragraphs per question, pooled; the titles of the supporting facts are gold.

    Paragraphs equal up to white space are one document. The ten of a chosen question stay with it, so that the pool
    holds its distractors. A list of objects with _id, question, answer, supporting_facts and context.
    """
    rows = read_json(source.path)
    if not isinstance(rows, list):
        raise DataError(f"{source.path} holds a {type(rows).__name__}, but HotpotQA is a list of questions.")
    seen: dict[str, str] = {}
    for number, row in enumerate(rows):
        where = f"{source.path.name}[{number}]"
        try:
            query, passages = _hotpotqa_row(source, row)
        except BadRow as bad:
            yield bad.at(where)
            continue
        for doc_id, text in passages:
            if doc_id not in seen:
                seen[doc_id] = text
                yield Document(doc_id=doc_id, pool=source.name, text=text)
        yield query


def _hotpotqa_row(source: Source, row: Any) -> tuple[Query, list[tuple[str, str]]]:
    limit = source.config.max_text_chars
    if not isinstance(row, dict):
        raise BadRow("not_an_object", row)
    identity = check_text(row.get("_id"), "_id", limit)
    question = check_text(row.get("question"), "question", limit)
    answer = check_text(row.get("answer"), "answer", limit)
    passages: dict[str, tuple[str, str]] = {}
    try:
        for title, sentences in row["context"]:
            check_text(title, "title", limit)
            text = check_text("".join(sentences), "context", limit)
            passages[title] = _passage(source, title, text)
        gold = sorted({passages[title][0] for title, _ in row["supporting_facts"]})
    except (KeyError, TypeError, ValueError) as error:
        raise BadRow("missing_field", f"context or supporting_facts: {error!r}") from error
    query = Query(
        query_id=f"{source.name}:{identity}",
        query=one_line(question),
        targets=(answer.strip(),),
        pool=source.name,
        split_key=identity,
        qrels=tuple((doc_id, 1) for doc_id in gold),
        related=tuple(doc_id for doc_id, _ in passages.values()),
        meta={"type": row["type"]} if isinstance(row.get("type"), str) else None,
    )
    return query, list(passages.values())


def read_squad(source: Source) -> Iterator[Record]:
    """SQuAD 2.0: the paragraph that a question was asked about is gold; unanswerable questions are left out.

    Questions are split by article, because those of one paragraph give each other away.
    """
    content = read_json(source.path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise DataError(f"{source.path} lacks the list 'data' of SQuAD articles.")
    limit = source.config.max_text_chars
    seen: set[str] = set()
    for number, article in enumerate(content["data"]):
        paragraphs = article.get("paragraphs", []) if isinstance(article, dict) else []
        for place, paragraph in enumerate(paragraphs):
            where = f"{source.path.name}[{number}].paragraphs[{place}]"
            try:
                title = check_text(article.get("title"), "title", limit).replace("_", " ")
                doc_id, text = _passage(source, title, check_text(paragraph.get("context"), "context", limit))
            except BadRow as bad:
                yield bad.at(where)
                continue
            if doc_id not in seen:
                seen.add(doc_id)
                yield Document(doc_id=doc_id, pool=source.name, text=text)
            for index, row in enumerate(paragraph.get("qas", [])):
                try:
                    yield _squad_row(source, row, title, doc_id)
                except BadRow as bad:
                    yield bad.at(f"{where}.qas[{index}]")


def _squad_row(source: Source, row: dict[str, Any], title: str, doc_id: str) -> Record:
    limit = source.config.max_text_chars
    identity = check_text(row.get("id"), "id", limit)
    if row.get("is_impossible"):
        return Skip(row=identity, reason="unanswerable")
    answers = row.get("answers") or []
    texts = [check_text(answer.get("text"), "answers", limit).strip() for answer in answers]
    if not texts:
        raise BadRow("missing_field", "answers")
    return Query(
        query_id=f"{source.name}:{identity}",
        query=one_line(check_text(row.get("question"), "question", limit)),
        targets=tuple(dict.fromkeys(texts)),
        pool=source.name,
        split_key=title,
        qrels=((doc_id, 1),),
    )


def _passage(source: Source, title: str, text: str) -> tuple[str, str]:
    """(doc_id, text) of a passage; the id is a function of the content."""
    whole = document_text(one_line(title), one_line(text))
    return f"{source.name}:{sha256_text(whole)[:16]}", whole
