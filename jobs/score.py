"""LLM feedback on every pair, likelihood or rank: python jobs/score.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("score")
