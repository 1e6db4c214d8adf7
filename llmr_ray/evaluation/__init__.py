"""Evaluation protocols, measures with intervals, and the report."""
