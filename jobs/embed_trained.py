"""Encodes corpus and queries with the trained embedder: python jobs/embed_trained.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("embed_trained")
