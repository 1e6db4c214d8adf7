"""Candidates for LLM feedback and training: BM25 and dense, gold and duplicates taken out."""
