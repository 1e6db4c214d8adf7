"""Candidates of each training query, BM25 and dense: python jobs/mine.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("mine")
