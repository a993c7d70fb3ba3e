"""A run whose data lies behind a URL is the run on the folder, bit for bit, and may move between the two."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_dist.data import fetch, remote
from tests.e2e.commands import LAUNCH, assert_same_end, llm_dist, losses, run, steps_saved
from tests.object_server import Fault, ObjectServer
from tests.s3_server import S3Server, require_packages

pytestmark = pytest.mark.e2e

WITHOUT_S3 = """
import sys
sys.modules["s3fs"] = None
from llm_dist.cli import main
main()
"""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages("aiohttp")
    monkeypatch.setattr(fetch, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_OPENING_PAUSE_SECONDS", 0.01)


@pytest.fixture
def server(shards: Path) -> Iterator[ObjectServer]:
    with ObjectServer(shards) as server:
        yield server


@pytest.fixture
def afar(server: ObjectServer, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides that read the same shards from the server."""

    def words(cache: str = "cache") -> list[str]:
        url = server.url
        return [f"data.train={url}/train", f"data.holdout={url}/holdout", f"data.cache={tmp_path / cache}"]

    return words


def train(*words: object) -> None:
    said = llm_dist("train", *words)
    assert said.code == 0, said.err


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, write_run_file: Callable[[Path], Path]) -> Callable[..., Path]:
    """`local(*overrides)`: folder of the run on this disk."""
    known: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in known:
            folder = tmp_path_factory.mktemp("local")
            train(write_run_file(folder), *overrides)
            known[overrides] = folder / "runs" / "tiny"
        return known[overrides]

    return make


@pytest.mark.parametrize(
    "overrides",
    [("eval.every_steps=4",), ("data.packing=best_fit", "data.document_mask=true", "data.workers=2")],
    ids=["concatenate", "best fit"],
)
def test_a_remote_run_is_the_local_one(
    run_file: Path, run_folder: Path, local: Callable[..., Path], afar: Callable[..., list[str]], overrides: tuple[str]
) -> None:
    train(run_file, *overrides, *afar())
    assert len(losses(run_folder)) == 8
    assert_same_end(run_folder, local(*overrides))


def test_two_ranks_read_through_faults_what_they_read_from_a_disk(
    run_file: Path, run_folder: Path, server: ObjectServer, afar: Callable[..., list[str]], tmp_path: Path
) -> None:
    kinds = ("status", "short_body", "reset", "short_range")
    server.faults = lambda number, *_: Fault(kinds[number // 3 % 4]) if number % 3 == 0 else None
    for words in (afar(), [f"run.dir={tmp_path / 'here'}"]):
        said = run([*LAUNCH, "--ranks", "2", run_file, "data.document_mask=true", *words])
        assert said.code == 0, said.err
    assert_same_end(run_folder, tmp_path / "here" / "tiny")
    assert len(server.requests) > 10


def test_a_run_moves_from_the_disk_to_the_server_and_back(
    run_file: Path, run_folder: Path, shards: Path, local: Callable[..., Path], afar: Callable[..., list[str]]
) -> None:
    """What data a run belongs to is told by fingerprints, not by where they lie."""
    schedule = "optim.total_steps=8"
    train(run_file, "run.steps=2", schedule)
    train(run_folder, "run.steps=5", *afar())
    train(run_folder, "run.steps=6", *afar("another-cache"))
    train(run_folder, "run.steps=8", f"data.train={shards}/train", f"data.holdout={shards}/holdout")
    assert_same_end(run_folder, local())


def test_a_run_on_s3_is_the_local_one(
    run_file: Path,
    run_folder: Path,
    shards: Path,
    local: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_packages("s3fs", "moto", "flask", "flask_cors")
    with S3Server(shards) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        words = [f"data.train={s3.url}/train", f"data.holdout={s3.url}/holdout", f"data.cache={tmp_path / 'cache'}"]
        train(run_file, *words)
    assert_same_end(run_folder, local())


def test_other_data_under_the_url_is_refused(
    run_file: Path, run_folder: Path, shards: Path, other_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(shards, tmp_path / "served")
    with ObjectServer(tmp_path / "served") as server:
        words = [f"data.train={server.url}/train", "data.holdout=[]", f"data.cache={tmp_path / 'cache'}"]
        train(run_file, "run.steps=4", "optim.total_steps=8", *words)
        shutil.rmtree(tmp_path / "served")
        shutil.copytree(other_shards, tmp_path / "served")
        refused = llm_dist("train", run_folder, "run.steps=8")
    assert "fingerprint" in refused.mistake or "tokenizer" in refused.mistake
    assert steps_saved(run_folder)[-1] == 4


def test_a_server_that_goes_ends_a_run_with_one_line(
    run_file: Path, run_folder: Path, server: ObjectServer, afar: Callable[..., list[str]]
) -> None:
    server.faults = lambda number, path, *_: Fault("status") if path.endswith(".tar") else None
    said = llm_dist("train", run_file, *afar())
    assert f"{server.url}/train/shard-000000.tar: {fetch.ATTEMPTS} attempts failed, the last with" in said.mistake
    server.faults = lambda *_: None
    train(run_file, *afar())
    assert steps_saved(run_folder)[-1] == 8


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/train", "gs needs a package that is missing"),
        ("nowhere://a/train", "Protocol not known: nowhere; name a folder, or a URL that fsspec knows"),
        ("http://127.0.0.1:1/train", "dataset.json: 8 attempts failed, the last with ClientConnectorError"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_line(run_file: Path, url: str, said: str) -> None:
    mistake = llm_dist("train", run_file, f"data.train={url}").mistake
    assert mistake.startswith(f"data.train={url}: {url}")
    assert said in mistake


def test_a_missing_extra_is_named(run_file: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_S3, "train", str(run_file), "data.train=s3://bucket/train"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: data.train=s3://bucket/train: s3://bucket/train: s3 needs a package that is missing")
    assert "pip install 'llm_dist[remote]'" in line
    assert "Traceback" not in done.stderr


def test_a_plan_reads_the_sizes_of_a_url(run_file: Path, server: ObjectServer, shards: Path) -> None:
    plan = [sys.executable, "-m", "launcher.cli", "plan", run_file, "--ranks", "2"]
    here, there = (run([*plan, f"data.train={place}/train", "--json"]) for place in (shards, server.url))
    assert here.code == 0, here.err
    assert there.json == here.json
    assert [asked.path for asked in server.requests] == ["/train/dataset.json"]
    missing = run([*plan, f"data.train={server.url}/nothing"])
    assert "nothing/dataset.json: not there; check the URL" in missing.mistake
