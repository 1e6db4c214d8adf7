"""Corpus encoding and exact sharded search."""
