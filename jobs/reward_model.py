"""The cross-encoder that learns how the LLM ranks candidates: python jobs/reward_model.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("reward_model")
