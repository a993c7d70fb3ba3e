"""What a kill -9 costs is booked: the time the run was down, and the steps it had to compute again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.goodput import read_goodput
from llm_dist import metrics
from tests.e2e.commands import TRAIN, Started, run, steps_saved

pytestmark = pytest.mark.e2e

SAVED, LAST = 300, 600
WORDS = (f"run.steps={LAST}", f"checkpoint.every_steps={SAVED}", "data.holdout=[]")
DOWN_SECONDS = 1.5
OWN_SECONDS = 1.1
"""How old an account may be when its process is killed."""


def test_after_a_kill_what_was_down_and_what_was_computed_again_is_booked(run_file, run_folder):
    first, second = (run_folder / "goodput" / f"attempt_{number:04d}.json" for number in (1, 2))
    began = time.time()
    with Started([*TRAIN, run_file, *WORDS]) as started:
        started.until(lambda: first.exists() and furthest_step(first) > SAVED + 1)
    down_since = time.time()
    (saved,), furthest = steps_saved(run_folder), furthest_step(first)
    time.sleep(DOWN_SECONDS)
    down_seconds = time.time() - down_since
    said = run([*TRAIN, run_file, *WORDS])
    assert said.code == 0, said.err
    took_seconds = second.stat().st_mtime - began

    booked = read_goodput(run_folder)
    assert booked.wall_seconds == pytest.approx(took_seconds, abs=0.5)
    assert down_seconds <= booked.seconds["down"] <= down_seconds + OWN_SECONDS
    lines = metrics.read(run_folder / "metrics.jsonl")
    again = [step_seconds(line) for line in lines if saved < line["step"] <= furthest]
    assert len(again) == furthest - saved
    # What the first of them takes beyond the usual is booked as compiling.
    assert sum(again[1:]) <= booked.seconds["replayed"] * 1.01
    assert booked.seconds["replayed"] <= sum(again) * 1.01


def furthest_step(account: Path) -> int:
    return json.loads(account.read_text())["furthest_step"]


def step_seconds(line: dict[str, Any]) -> float:
    return sum(line["seconds"].get(phase, 0.0) for phase in ("data", "agree", "step"))
