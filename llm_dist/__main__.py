"""`python -m llm_dist`: the same as `llm-dist`; what torchrun and the launcher start."""

from llm_dist.cli import main

main()
