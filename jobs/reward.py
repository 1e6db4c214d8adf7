"""LLM scores to rewards: python jobs/reward.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("reward")
