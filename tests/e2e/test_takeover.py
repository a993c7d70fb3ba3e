"""Two attempts at a run live at once, as after a node that was cut off comes back: the newer one's run is untouched."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from llm_dist import metrics
from llm_dist.errors import Exit
from tests.e2e.commands import TRAIN, Started, assert_same_end, llm_dist, steps_saved

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

WORDS = ("run.steps=400", "checkpoint.every_steps=5", "log.every_steps=1", "data.holdout=[]")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_an_attempt_that_comes_back_leaves_at_once_and_touches_nothing(
    run_file: Path, run_folder: Path, write_run_file, tmp_path: Path, asynchronous: str
) -> None:
    words = (*WORDS, f"checkpoint.asynchronous={asynchronous}")
    with Started([*TRAIN, run_file, *words]) as old:
        old.until(lambda: (run_folder / "checkpoints").is_dir() and steps_saved(run_folder))
        old.send(signal.SIGSTOP)
        assert metrics.read(run_folder / "metrics.jsonl")[-1]["step"] < 380
        newer = llm_dist("train", run_file, *words)
        assert newer.code == 0
        assert "attempt 2: resumed at step" in newer.err
        before = contents(run_folder)
        old.send(signal.SIGCONT)
        woken = time.monotonic()
        said = old.end()
    assert time.monotonic() - woken < 10.0
    assert said.code == Exit.SUPERSEDED
    assert "attempt 2 has taken this run over; attempt 1 leaves, and has written nothing since" in said.err
    assert "Traceback" not in said.err
    after = contents(run_folder)
    checkpoints = run_folder / "checkpoints"
    assert {path: raw for path, raw in after.items() if checkpoints in path.parents} == {
        path: raw for path, raw in before.items() if checkpoints in path.parents
    }

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert llm_dist("train", write_run_file(undisturbed), *words).code == 0
    assert_same_end(run_folder, undisturbed / "runs" / "tiny")
