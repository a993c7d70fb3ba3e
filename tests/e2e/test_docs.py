"""Every command of the pages is run as it stands, in page order, in one folder: nobody is told what does not work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, Block, blocks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]  # the pages have some sixty commands

SECONDS = 240
"""A block that takes longer hangs."""


def shell(block: Block, folder: Path) -> None:
    """Run a block as a reader would paste it, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    where = f"{block.page.name}, line {block.line}"
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{block.text}\n{done.stdout}\n{done.stderr}"


def test_every_command_of_the_pages_runs(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh" and block.why_not_run is None:
                shell(block, tmp_path)
    assert {"tiny", "with-torchrun", "with-accelerate"} <= {path.name for path in (tmp_path / "runs").iterdir()}
