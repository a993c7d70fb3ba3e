"""`python -m llm_dist`: the same as `llm-dist`; what torchrun and the launcher start."""

import os
import sys

from llm_dist.train import stop


def run() -> None:
    """Listen for signals before anything heavy is imported: a rank that is asked to stop leaves in order."""
    if sys.argv[1:2] == ["train"]:
        stop.listen()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun leaves its ranks behind when it is killed
            stop.leave_with_parent()
    from llm_dist.cli import main

    main()


run()
