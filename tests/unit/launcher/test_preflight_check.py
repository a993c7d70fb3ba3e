"""The check as it is started: by hand on one machine, and by a job on each of its nodes."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.preflight import facts
from launcher.preflight.gpus import Gpu

DEVICES = {
    "versions": {"torch": "2.13.0"},
    "devices": [{"name": "x86_64", "is_gpu": False, "flops_per_second": 1e11}],
}


@pytest.fixture
def probe(tmp_path_factory, monkeypatch):
    """`probe(script)`: what measures with torch; a sound machine until it is called."""

    def replace(script):
        monkeypatch.setattr(facts, "PROBE", (sys.executable, "-c", script))

    replace(f"print('a warning'); print({json.dumps(DEVICES)!r})")
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("no-programs")))
    return replace


def check(*words):
    return CliRunner().invoke(app, ["check", *map(str, words), "--min-disk", "0", "--min-memory", "0"])


def test_a_sound_machine_is_ready(probe, tmp_path):
    ended = check(tmp_path)
    assert ended.exit_code == 0, ended.output
    assert "no faults: ready to start" in ended.stdout
    assert re.search(r"matmul 0 .*0\.1 TFLOP/s \(x86_64\)", ended.stdout)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_for_scripts_it_is_one_object(probe, tmp_path):
    ended = check(tmp_path, "--json", "--gpus", 8)
    assert ended.exit_code == 2
    verdict = json.loads(ended.stdout)
    (node,) = verdict["facts"]
    assert node["devices"] == DEVICES["devices"]
    assert node["versions"]["torch"] == "2.13.0"
    assert node["gpus"] is None
    assert verdict["faults"] == [{"nodes": [node["node"]], "what": "torch sees 0 GPUs, 8 wanted", "blamed": True}]


def test_torch_that_fails_is_a_fault_in_its_last_words(probe, tmp_path):
    probe("raise RuntimeError('CUDA driver is insufficient')")
    ended = check(tmp_path)
    assert ended.exit_code == 2
    assert "torch measured no matmul: RuntimeError: CUDA driver is insufficient" in ended.stdout


def test_torch_that_hangs_is_a_fault(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "PROBE_SECONDS", 0.5)
    probe("import time; time.sleep(60)")
    ended = check(tmp_path)
    assert ended.exit_code == 2
    assert "torch measured no matmul in 0.5 s" in ended.stdout


def test_gpus_that_torch_does_not_see_are_a_fault_unless_they_are_hidden_from_it(probe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(facts, "read_gpus", lambda: (Gpu(0, "NVIDIA H100", "570.86.15", 2**30, 0, False),))
    ended = check(tmp_path)
    assert ended.exit_code == 2
    assert "torch sees none of 1 GPUs" in ended.stdout
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check(tmp_path).exit_code == 0


def test_too_little_disk_is_said_in_words(probe, tmp_path):
    ended = CliRunner().invoke(app, ["check", str(tmp_path), "--min-disk", "1e6"])
    assert ended.exit_code == 2
    assert re.search(r"fault: .*free for the run folder, 976\.56 TiB wanted \(no node is blamed\)", ended.stdout)


def test_a_folder_that_is_not_there_is_named(probe, tmp_path):
    ended = check(tmp_path / "nowhere")
    assert ended.exit_code == 2
    assert f"error: {tmp_path / 'nowhere'}: No such file or directory" in ended.stderr


def on_node(run, node, *words):
    command = [sys.executable, "-m", "launcher.preflight", str(run), "--incarnation", "7.0"]
    command += ["--nodes", "node1,node2,node3", "--min-disk", "0", "--min-memory", "0", *words]
    return subprocess.Popen(
        command, env={**os.environ, "SLURMD_NODENAME": node}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def verdict_of(run):
    return json.loads((run / "preflight" / "7.0" / "verdict.json").read_text())


def test_a_job_checks_its_nodes_and_the_first_one_judges(tmp_path):
    started = [on_node(tmp_path, node) for node in ("node1", "node2", "node3")]
    said = [each.communicate(timeout=120)[1] for each in started]
    assert [each.returncode for each in started] == [0, 0, 0], said
    assert said == ["no faults: ready to start\n", "", ""]
    verdict = verdict_of(tmp_path)
    assert verdict["faults"] == []
    assert [each["node"] for each in verdict["facts"]] == ["node1", "node2", "node3"]
    assert all(each["devices"][0]["flops_per_second"] > 1e8 for each in verdict["facts"])
    assert all(re.fullmatch("[0-9a-f]{64}", each["code"]) for each in verdict["facts"])


def test_a_node_that_never_starts_is_blamed_by_name(tmp_path):
    started = [on_node(tmp_path, node, "--seconds", "3") for node in ("node1", "node3")]
    said = [each.communicate(timeout=120)[1] for each in started]
    assert [each.returncode for each in started] == [2, 0], said
    missing, _ = verdict_of(tmp_path)["faults"]
    assert missing == {"nodes": ["node2"], "what": "left no measurement that the others can read", "blamed": True}
    assert "fault: node2: left no measurement" in said[0]


@pytest.mark.parametrize(
    ("node", "words", "said"),
    [
        ("node9", (), "SLURMD_NODENAME=node9 is none of --nodes node1,node2,node3"),
        ("node1", ("--number", "3"), "--number 3: --nodes names 3, so it is 0 to 2"),
    ],
)
def test_a_node_that_is_none_of_them_is_refused(tmp_path, node, words, said):
    started = on_node(tmp_path, node, *words)
    error = started.communicate(timeout=60)[1]
    assert started.returncode == 2
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "preflight").exists()
