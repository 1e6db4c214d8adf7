"""The reward model's scores of all candidates: python jobs/teach.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("teach")
