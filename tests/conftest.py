"""What every test starts from: one thread, no network, and corpora found in one way."""

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path

for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402 (the environment comes before whatever pytest's plugins load)

ROOT = Path(__file__).parents[1]
NEEDED_IN_CI = {"data": "real data", "slurm": "a real Slurm"}


@pytest.fixture
def data_folder(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`data_folder(name)`: the folder of one real corpus; skips, saying so, where it is not there."""
    assert request.node.get_closest_marker("data"), "a test that reads real corpora is marked @pytest.mark.data"
    corpora = Path(os.environ.get("LLM_DIST_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        if not (corpora / name).is_dir():
            pytest.skip(f"no corpus {name!r} in {corpora}; set LLM_DIST_DATA to the folder that holds it")
        return corpora / name

    return find


def pytest_collection_finish() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of two workers one runs the tests that start ranks, one after another, and the other all that start none."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.is_relative_to(ROOT / "tests" / "dist") or item.path.is_relative_to(ROOT / "tests" / "e2e"):
                item.add_marker(pytest.mark.xdist_group("ranks"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needed = [what for marker, what in NEEDED_IN_CI.items() if item.get_closest_marker(marker)]
    if report.skipped and needed and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"with CI=true a test of {needed[0]} may not be skipped: {report.longrepr}"
    return report
