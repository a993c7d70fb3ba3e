"""A run that goes on with more or fewer ranks, whoever launches them, is the run on the layout it began with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm_dist import metrics
from tests.e2e import recorded
from tests.e2e.commands import Said, losses, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

RECORDED = str(Path(recorded.__file__))
LAUNCH = (sys.executable, RECORDED, "local", "--ranks")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--standalone")
WORDS = ("optim.total_steps=20", "data.holdout=[]", "checkpoint.every_steps=3", "plan.max_waste=0.5")
ROWS_PER_STEP = 8
ENGINES = {
    "plain": ("engine.name=plain",),
    "zero2": ("engine.name=zero", "engine.zero_stage=2"),
    "fsdp": ("engine.name=fsdp",),
}


def train(record: Path, *command: object, kill: str = ":") -> Said:
    record.mkdir(exist_ok=True)
    said = run(command, RECORD=str(record), KILL=kill)
    assert said.code == 0, said.err
    return said


def lines(run_folder: Path, *keys: str) -> dict[int, list[float]]:
    records = metrics.read(run_folder / "metrics.jsonl")
    return {record["step"]: [record[key] for key in keys] for record in records}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_run_file) -> Path:
    """Folder of 20 steps of the plain engine on 2 ranks, started once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder / "record", *LAUNCH, 2, write_run_file(folder), *WORDS, "run.steps=20")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_other_numbers_of_ranks_go_on_with_the_same_rows_rates_and_losses(
    tmp_path, write_run_file, undisturbed, engine
):
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    run_file, folder, record = write_run_file(tmp_path), tmp_path / "runs" / "tiny", tmp_path / "record"
    words = (run_file, *WORDS, *ENGINES[engine])
    train(record, *LAUNCH, 2, *words, "run.steps=7")
    torchrun = (*TORCHRUN, "--nproc-per-node=3", "--max-restarts=1", RECORDED, "train")
    said = train(record, *torchrun, *words, "run.steps=14", kill="1:12")
    assert [at for at in (7, 9, 10, 11) if f"resumed at step {at} of 14 steps, 3 ranks" in said.err] == [7, 9]
    said = train(record, *LAUNCH, 1, *words, "run.steps=20")
    assert "resumed at step 14 of 20 steps, 1 ranks" in said.err

    theirs = undisturbed / "runs" / "tiny"
    assert lines(folder, "lr", "tokens") == lines(theirs, "lr", "tokens")
    assert losses(folder) == pytest.approx(losses(theirs), abs=1e-5)
    ours, expected = recorded.orders(record), recorded.orders(undisturbed / "record")
    for step in range(1, 21):
        assert len(set(expected[step])) == ROWS_PER_STEP
        assert set(ours[step]) == set(expected[step]), f"step {step} read other rows"
        assert len(ours[step]) == ROWS_PER_STEP or 9 < step <= 12  # only what the kill undid was read again
