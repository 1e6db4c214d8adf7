"""What holds after a round of labelling: python jobs/label.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("label")
