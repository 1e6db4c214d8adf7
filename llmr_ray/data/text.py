"""The text of a document as it is embedded, searched and trained on: one definition for every stage."""

import pyarrow as pa


def document_text(title: str | None, text: str) -> str:
    """Title and text in one string, ``{title} {text}`` (methods.md A.7, the key template of the Wikipedia corpus)."""
    return f"{title} {text}" if title else text


def document_texts(documents: pa.Table) -> list[str]:
    """`document_text` of each row, from the columns `title` and `text`."""
    columns = documents["title"].to_pylist(), documents["text"].to_pylist()
    return [document_text(title, text) for title, text in zip(*columns, strict=True)]
