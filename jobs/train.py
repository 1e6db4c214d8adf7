"""Trains the embedder with DDP on Ray Train: python jobs/train.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("train")
