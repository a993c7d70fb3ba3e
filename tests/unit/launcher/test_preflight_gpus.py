"""What nvidia-smi may print: healthy, without ECC, ill, and silent."""

import stat
import time

import pytest

from launcher.preflight import gpus
from launcher.preflight.gpus import NoAnswerError, parse, read_gpus

TWO_H100 = """\
0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 0, No
1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 2, Yes
"""
WORKSTATION = "0, NVIDIA GeForce RTX 4090, 560.35.03, 24564, [N/A], [N/A]\n"
LOST = "3, NVIDIA A100-SXM4-40GB, 550.54.15, [GPU is lost], [Unknown Error], No\n"


def test_each_line_is_a_gpu():
    first, second = parse(TWO_H100)
    assert (first.index, first.name, first.driver) == (0, "NVIDIA H100 80GB HBM3", "570.86.15")
    assert (first.memory_bytes, first.ecc_errors, first.must_be_reset) == (81559 * 2**20, 0, False)
    assert (second.index, second.ecc_errors, second.must_be_reset) == (1, 2, True)
    assert first.unreadable == second.unreadable == ()


def test_a_gpu_that_counts_no_errors_is_not_ill():
    (gpu,) = parse(WORKSTATION)
    assert (gpu.ecc_errors, gpu.must_be_reset, gpu.unreadable) == (None, False, ())


def test_what_the_driver_cannot_read_is_kept_in_its_words():
    (gpu,) = parse(LOST)
    assert gpu.unreadable == (
        "memory.total [GPU is lost]",
        "ecc.errors.uncorrected.volatile.total [Unknown Error]",
    )
    assert (gpu.memory_bytes, gpu.ecc_errors) == (None, None)


def test_a_machine_without_gpus_prints_nothing():
    assert parse("") == ()


@pytest.mark.parametrize(
    "text",
    [
        "No devices were found\n",
        "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 0\n",
        "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 0, No, more\n",
        "x, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 0, No\n",
    ],
)
def test_what_is_no_gpu_is_not_taken_for_one(text):
    with pytest.raises(NoAnswerError, match="describes no GPU"):
        parse(text)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """`driver(script)`: what nvidia-smi is on this machine; nothing until it is called."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(script):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return install


def test_without_the_program_nothing_is_known(driver, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_gpus() is None


def test_its_answer_is_read(driver):
    driver(f"cat <<'END'\n{TWO_H100}END")
    assert read_gpus() == parse(TWO_H100)


def test_its_failure_is_told_in_its_words(driver):
    driver("echo 'Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.'; exit 15")
    with pytest.raises(NoAnswerError, match=r"ended with 15: Unable to determine .* GPU is lost"):
        read_gpus()


def test_a_driver_that_hangs_is_left(driver, monkeypatch):
    monkeypatch.setattr(gpus, "_SECONDS", 0.2)
    driver("exec sleep 30")
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match="no answer"):
        read_gpus()
    assert time.monotonic() - began < 10
