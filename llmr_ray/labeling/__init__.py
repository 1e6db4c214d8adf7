"""Labels of relevance: those of the LLM, those that the retriever may give in its place; questions (ARL2)."""
