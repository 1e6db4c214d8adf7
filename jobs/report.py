"""Writes results.json, report.html and run files: python jobs/report.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("report")
