from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_dist.checkpoint import layout
from llm_dist.checkpoint.layout import DamagedCheckpoint, Found, Manifest, RankFiles
from llm_dist.errors import UserError

MANIFEST = Manifest(
    step=100,
    attempt=3,
    num_ranks=1,
    optimizer_step=99,
    engine="zero",
    fingerprints={"data": "d"},
    trajectory={"best_step": 50, "window": [1.5, float("inf")], "text": "é\n", "numbers": {10: 1, 9: 2}},
    state={"param/a": (2, 3), "param/b": ()},
    files=[RankFiles(0, 1, "aa", 2, 3, "bb")],
    created="2026-01-01T00:00:00+00:00",
)


def write(checkpoints: Path, step: int, best_step: int | None = None) -> Path:
    folder = checkpoints / layout.checkpoint_name(step)
    folder.mkdir(parents=True)
    fields = {**vars(MANIFEST), "step": step, "trajectory": {"best_step": best_step}}
    (folder / layout.MANIFEST).write_bytes(Manifest(**fields).to_bytes())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    for step in (100, 200, 300):
        write(tmp_path / "checkpoints", step, best_step=140)
    return tmp_path


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / layout.MANIFEST).write_bytes(MANIFEST.to_bytes())
    read = layout.read_manifest(tmp_path)
    assert read.state == MANIFEST.state and read.files == MANIFEST.files and read.optimizer_step == 99
    assert read.trajectory == {**MANIFEST.trajectory, "numbers": {"10": 1, "9": 2}}
    assert read.to_bytes() == MANIFEST.to_bytes()


def test_every_changed_byte_and_every_truncation_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / layout.MANIFEST
    raw = MANIFEST.to_bytes()
    damaged = [raw[:end] for end in range(len(raw))]
    flips = {at: {1 << at % 8, 0x20} for at in range(len(raw))}  # 0x20 turns E into e, which JSON may read alike
    damaged += [raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :] for at, bits in flips.items() for bit in bits]
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json.*checksum"):
            layout.read_manifest(tmp_path)


def test_a_newer_format_is_refused_as_such(tmp_path: Path) -> None:
    newer = Manifest(**{**vars(MANIFEST), "format": 2})
    (tmp_path / layout.MANIFEST).write_bytes(newer.to_bytes())
    with pytest.raises(UserError, match="format 2 is of a newer llm_dist") as caught:
        layout.read_manifest(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_only_final_names_with_a_manifest_are_seen(run: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step_00000400").mkdir()
    for name in ("step_00000500.damaged", ".writing-step_00000600-attempt_0001-save_0001", "step_7", "other"):
        (checkpoints / name).mkdir()
        (checkpoints / name / layout.MANIFEST).write_text("{}")
    assert [each.step for each in layout.list_complete(checkpoints)] == [100, 200, 300]
    assert layout.latest(checkpoints) == Found(300, checkpoints / "step_00000300")
    assert layout.latest(run / "nowhere") is None


def test_steps_beyond_eight_digits_sort_by_number(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999)
    write(tmp_path, 100_000_000)
    assert layout.latest(tmp_path) == Found(100_000_000, tmp_path / "step_100000000")


def test_find_chooses_latest_step_best_or_the_checkpoint_itself(run: Path) -> None:
    assert layout.find(run).step == 300
    assert layout.find(run, step=200).step == 200
    assert layout.find(run, best=True).step == 100
    assert layout.find(run / "checkpoints" / "step_00000200") == Found(200, run / "checkpoints" / "step_00000200")


@pytest.mark.parametrize(
    ("path", "step", "best", "message"),
    [
        (".", 250, False, "no complete checkpoint of step 250; it has 100, 200, 300"),
        (".", 100, True, "give one of them"),
        ("checkpoints", None, False, "neither a run folder"),
        ("nowhere", None, False, "neither a run folder"),
        ("checkpoints/step_00000100", 100, False, "name its run folder"),
        ("checkpoints/step_00000400", None, False, "incomplete checkpoint"),
    ],
)
def test_find_says_in_one_line_what_is_wrong(run: Path, path: str, step: int | None, best: bool, message: str) -> None:
    (run / "checkpoints" / "step_00000400").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        layout.find(run / path, step, best)
    assert "\n" not in str(caught.value)


def test_find_without_checkpoint_or_without_best(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        layout.find(tmp_path)
    write(tmp_path / "checkpoints", 1)
    with pytest.raises(UserError, match="no best checkpoint"):
        layout.find(tmp_path, best=True)


def test_nearest_prefers_the_later_of_two() -> None:
    found = [Found(step, Path(str(step))) for step in (100, 200)]
    assert [layout.nearest(found, step) for step in (149, 150)] == found
    assert layout.nearest([], 1) is None


@pytest.mark.parametrize("module", ["layout", "pieces", "commit"])
def test_the_room_is_torch_free_but_for_the_store(module: str) -> None:
    code = f"import sys, json, llm_dist.checkpoint.{module}; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
