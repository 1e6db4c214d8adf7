"""How much the reward model ranks as the LLM does: python jobs/agree.py CONFIG [key=value ...]."""

from llmr_ray.cli import run_stage

if __name__ == "__main__":
    run_stage("agree")
