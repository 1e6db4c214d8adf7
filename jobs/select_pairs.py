"""Which pairs a round of labelling asks the LLM about: python jobs/select_pairs.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("select")
