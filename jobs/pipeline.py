"""The whole pipeline: ray job submit -- python jobs/pipeline.py conf/quickstart.yaml [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage(None)
