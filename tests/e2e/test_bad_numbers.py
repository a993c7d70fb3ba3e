"""Steps whose numbers cannot be right: caught on all ranks in the step itself, and left out as the run file says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_dist.errors import Exit
from tests.e2e.commands import Said, assert_same_end, llm_dist, losses, run, steps_saved
from tests.e2e.faulty import planted

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FAULTY = Path(__file__).with_name("faulty.py")
OFTEN = ("checkpoint.every_steps=3", "checkpoint.keep_last=9", "run.steps=12", "optim.total_steps=12")


Alone = Callable[..., Said]


@pytest.fixture
def alone(run_file: Path) -> Alone:
    """`alone(fault, *words)`: train on one rank with a fault planted; in this process, where the engine bears it."""

    def train(fault: str, *words: str) -> Said:
        if "engine.name=zero" in words:  # DeepSpeed's groups do not survive a second run in one process
            return run([sys.executable, FAULTY, "train", run_file, *OFTEN, *words], FAULT=fault)
        with planted(fault):
            return llm_dist("train", run_file, *OFTEN, *words)

    return train


def torchrun(fault: str, run_file: Path, *words: str, restarts: int = 0, mark: Path | None = None) -> Said:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(FAULTY), "train", str(run_file), *OFTEN, *words]
    return run(command, FAULT=fault, FAULT_MARK=str(mark or ""), OMP_NUM_THREADS="1")


def named(run_file: Path, name: str) -> tuple[str, Path]:
    return f"run.name={name}", run_file.parent / "runs" / name


def test_the_run_stops_in_the_step_itself_and_names_its_documents(run_file: Path, run_folder: Path) -> None:
    said = torchrun("nan:8", run_file)
    assert said.code != 0
    found = re.search(
        r"error: step 8: the loss is nan, the gradient norm nan; nothing was saved after step 6; it read "
        r"(docstrings.jsonl document \d+(?:, docstrings.jsonl document \d+)*)(?: and \d+ more)? "
        r"\(llm-dist data trace \S+ --step 8\); lower optim.lr",
        said.err,
    )
    assert found, said.err
    assert steps_saved(run_folder) == [3, 6]
    traced = llm_dist("data", "trace", run_folder, "--step", "8", "--json").json["documents"]
    read = {f"{each['file']} document {each['number']}" for each in traced}
    assert set(found[1].split(", ")) <= read


@pytest.mark.parametrize("engine", [("engine.name=plain",), ("engine.name=fsdp",), ("engine.name=zero",)])
def test_leaving_out_and_going_back_end_alike(alone: Alone, run_file: Path, engine: tuple[str, ...]) -> None:
    ends = []
    policies = ["rewind_and_skip"] if engine == ("engine.name=zero",) else ["skip", "rewind_and_skip"]
    for policy in policies:
        word, folder = named(run_file, policy)
        said = alone("nan:5,8", word, f"guard.policy={policy}", *engine)
        assert said.code == Exit.DONE, said.err
        assert len(re.findall(r"step [58] is left out: the loss is nan", said.err)) == 2
        assert {8, 5}.isdisjoint(losses(folder)) and {4, 6, 7, 9, 12} <= losses(folder).keys()
        records = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [5, 8]
        assert all("document" in record["documents"] for record in records)
        ends.append(folder)
    # A sound machine that is told which steps to leave out comes to the same end: they are an input to the replay.
    word, folder = named(run_file, "told")
    assert alone("nan:99", word, *engine, "run.steps=1").code == Exit.DONE
    (folder / "skipped.jsonl").write_text((ends[0] / "skipped.jsonl").read_text())
    said = alone("nan:99", word, *engine)
    assert said.code == Exit.DONE, said.err
    for other in ends:
        assert_same_end(folder, other)


def test_a_spike_is_left_out(alone: Alone, run_folder: Path) -> None:
    words = (
        "guard.policy=skip",
        "guard.spike_z=6",
        "run.steps=40",
        "optim.total_steps=40",
        "checkpoint.every_steps=20",
    )
    said = alone("spike:33", *words)
    assert said.code == Exit.DONE, said.err
    assert re.search(
        r"step 33 is left out: the loss \S+ lies \S+ deviations above \S+, the median of 32 steps", said.err
    )
    assert losses(run_folder).keys() == set(range(1, 41)) - {33}


def test_too_many_steps_left_out_stop_the_run(alone: Alone, run_folder: Path) -> None:
    said = alone("nan:4,5,6,7", "guard.policy=skip", "guard.max_skips=2")
    assert said.code != 0
    assert re.search(r"error: step 6: .*; more than guard.max_skips=2 of the last 100 steps are left out", said.err)
    assert steps_saved(run_folder) == [3]


def test_a_flipped_bit_is_found_never_saved_and_mended_by_a_restart(run_file: Path, tmp_path: Path) -> None:
    word, sound = named(run_file, "sound")
    assert torchrun("nan:99", run_file, word).code == Exit.DONE
    word, flipped = named(run_file, "flipped")
    said = torchrun("flip:8", run_file, word, restarts=1, mark=tmp_path / "mark")
    assert said.code == Exit.DONE, said.err
    assert re.search(r"step 9: ranks 0, 1 hold different values of param/\S+: a flipped bit", said.err)
    assert (tmp_path / "mark").exists()
    assert_same_end(sound, flipped)


def test_zero_cannot_leave_an_update_out(run_file: Path) -> None:
    mistake = llm_dist("train", run_file, "engine.name=zero", "guard.policy=skip").mistake
    assert 'choose guard.policy="rewind_and_skip", or engine.name="fsdp"' in mistake
