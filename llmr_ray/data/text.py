"""The text of a document as it is embedded, searched and trained on: one definition for every stage."""


def document_text(title: str | None, text: str) -> str:
    """Title and text in one string, ``{title} {text}`` (methods.md A.7, the key template of the Wikipedia corpus)."""
    return f"{title} {text}" if title else text
