"""Copies of test queries in what trains and what may be retrieved: python jobs/leakage.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("leakage")
