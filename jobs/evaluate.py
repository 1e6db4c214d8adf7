"""Every method on every scenario's test queries: python jobs/evaluate.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("evaluate")
