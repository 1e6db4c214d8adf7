"""Rewards and labels to training groups: python jobs/group.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("group")
