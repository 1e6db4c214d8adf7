"""Builds the base embedder's FAISS shards: python jobs/index_base.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("index_base")
