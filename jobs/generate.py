"""Training questions that the LLM writes about passages: python jobs/generate.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("generate")
