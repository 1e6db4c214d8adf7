"""`python -m llmr_ray`: the command line."""

from llmr_ray.cli import main

main()
