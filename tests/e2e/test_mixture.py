"""A mixture of packed sources that is killed, resumed with a new source and refused another past."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from llm_dist import config, metrics
from llm_dist.checkpoint import layout
from llm_dist.data.bins import plan_bins
from llm_dist.data.index import open_shards
from llm_dist.data.opening import order_seed
from llm_dist.data.order import Order
from llm_dist.data.packing import cell_windows
from tests.e2e.commands import LAUNCH, Started, assert_same_end, llm_dist, losses, run, steps_saved
from tests.e2e.conftest import tokenized

pytestmark = pytest.mark.e2e

STEPS, SEQUENCE_TOKENS, SEQUENCES_PER_STEP, SEED = 60, 32, 8, 3
PACKED = ("data.packing=best_fit", "data.document_mask=true", f"run.steps={STEPS}", "data.holdout=[]")
TWO_RANKS = ("--ranks", "2")


@pytest.fixture(scope="module")
def sources(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus dealt to three sources of different sizes, one of which is read over again within the run."""
    folder = tmp_path_factory.mktemp("sources")
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = {"books": lines[: len(lines) // 2], "code": lines[len(lines) // 2 : -10], "web": lines[-10:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return {name: tokenized(folder / f"{name}.jsonl", tokenizer, folder / name) / "train" for name in parts}


def table(sources: dict[str, Path], *names: str) -> str:
    return "data.train={" + ", ".join(f'{name}="{sources[name]}"' for name in names) + "}"


Segments = list[tuple[int, dict[str, float]]]


def mixture(segments: Segments) -> str:
    weights = [
        f"{{from_step={first}, weights={{{', '.join(f'{name}={weight}' for name, weight in each.items())}}}}}"
        for first, each in segments
    ]
    return f"data.mixture=[{', '.join(weights)}]"


BEGINS: Segments = [(0, {"books": 0.7, "web": 0.3})]


def tokens_by_arithmetic(sources: dict[str, Path], segments: Segments, step: int) -> dict[str, int]:
    """Tokens of each source after `step` steps: of its first so many windows, each being a bin of its documents.

    For two sources at most in a segment, so that the second gets what the first does not.
    """
    counts = dict.fromkeys(sources, 0)
    for (first, weights), end in zip(segments, [*(first for first, _ in segments[1:]), step], strict=True):
        num_sequences = max(0, min(end, step) - first) * SEQUENCES_PER_STEP
        (one, weight), (other, rest) = ((name, round(10 * weight)) for name, weight in sorted(weights.items()))
        nearest = (2 * num_sequences * weight + weight + rest) // (2 * (weight + rest))
        counts[one] += nearest
        counts[other] += num_sequences - nearest
    tokens = {}
    for name, count in counts.items():
        shards = open_shards(sources[name])
        bins = [
            sum(size for _, size in plan.pieces(number))
            for chunk in range(len(shards.chunks))
            for plan in [plan_bins(shards.document_ends(chunk), SEQUENCE_TOKENS)]
            for number in range(len(plan.ends))
        ]
        order = Order(len(bins), cell_windows(SEQUENCE_TOKENS), order_seed(SEED, name))
        tokens[name] = int(np.array(bins)[order.windows(np.arange(count))].sum())
    return tokens


def source_tokens(run_folder: Path, step: int) -> dict[str, int]:
    """As the last attempt logged them."""
    records = {record["step"]: record for record in metrics.read(run_folder / "metrics.jsonl") if "sources" in record}
    return {name: source["tokens"] for name, source in records[step]["sources"].items()}


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, write_run_file: Callable[[Path], Path], sources: dict[str, Path]
) -> Path:
    """A run folder of two ranks that were killed behind a checkpoint; tests that write work on copies."""
    folder = tmp_path_factory.mktemp("killed")
    words = (*PACKED, table(sources, "books", "web"), mixture(BEGINS))
    run_folder = folder / "runs" / "tiny"
    with Started([*LAUNCH, write_run_file(folder), *TWO_RANKS, *words]) as started:
        started.until(lambda: steps_saved(run_folder) and max(losses(run_folder)) > steps_saved(run_folder)[-1])
        launcher = psutil.Process(started.process.pid)
        launcher.send_signal(signal.SIGSTOP)  # else it would start the ranks again
        for process in launcher.children(recursive=True):
            process.kill()
        launcher.kill()
    assert 0 < steps_saved(run_folder)[-1] < STEPS
    return run_folder


def test_another_past_is_refused_in_one_line_and_nothing_is_written(killed: Path, sources: dict[str, Path]) -> None:
    step = steps_saved(killed)[-1]
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file() and path.parent.name != "logs"}
    accept = ("--accept", "data.mixture")
    changes = {
        "other weights": mixture([(0, {"books": 0.6, "web": 0.4})]),
        "a segment too early": mixture([*BEGINS, (step - 1, {"web": 1})]),
        "none": "data.mixture=[]",
    }
    for change in changes.values():
        mistake = llm_dist("train", killed, change, *accept).mistake
        assert mistake.startswith(f"data.mixture: {step} steps are finished, and its segments before that were ")
    later = mixture([*BEGINS, (step, {"web": 1})])
    assert llm_dist("train", killed, later).mistake.endswith("; add --accept data.mixture to change it from here on")
    missing = llm_dist("train", killed, table(sources, "web"), mixture([(0, {"web": 1})]), *accept).mistake
    assert missing.startswith("data.mixture: ") or missing.startswith("source books of data.train is missing")
    other = f'data.train={{books="{sources["code"]}", web="{sources["web"]}"}}'
    assert llm_dist("train", killed, other).mistake.startswith("source books of data.train has fingerprint ")
    assert before == {
        path: path.read_bytes() for path in killed.rglob("*") if path.is_file() and path.parent.name != "logs"
    }


def test_killed_and_resumed_with_a_new_source_is_bitwise_the_uninterrupted_run(
    killed: Path, sources: dict[str, Path], tmp_path: Path, write_run_file: Callable[[Path], Path]
) -> None:
    killed = shutil.copytree(killed, tmp_path / "killed")
    saved = steps_saved(killed)[-1]
    segments: Segments = [*BEGINS, (saved + 3, {"code": 0.5, "web": 0.5})]
    words = (table(sources, "books", "code", "web"), mixture(segments))
    resumed = run([*LAUNCH, killed, *TWO_RANKS, *words, "--accept", "data.mixture"])
    assert resumed.code == 0, resumed.err
    assert f"attempt 2: resumed at step {saved} of {STEPS} steps" in resumed.err
    whole = run([*LAUNCH, write_run_file(tmp_path), *TWO_RANKS, *PACKED, *words])
    assert whole.code == 0, whole.err
    uninterrupted = tmp_path / "runs" / "tiny"
    assert_same_end(killed, uninterrupted)
    for step in (1, saved, saved + 3, saved + 4, STEPS):
        wanted = tokens_by_arithmetic(sources, segments, step)
        for folder in (killed, uninterrupted):
            found = source_tokens(folder, step)
            assert {name: found.get(name, 0) for name in sources} == wanted, step
    for folder in (killed, uninterrupted):
        trajectory = layout.read_manifest(layout.find(folder).folder).trajectory
        assert trajectory["source_tokens"] == source_tokens(folder, STEPS)
        assert trajectory["tokens"] == sum(trajectory["source_tokens"].values()) < STEPS * 256
    assert config.load(killed).data.mixture == config.load(uninterrupted).data.mixture
    accepted = [json.loads(path.read_text())["accepted"] for path in sorted((killed / "attempts").iterdir())]
    assert accepted == [[], ["data.mixture"]]


def test_order_and_trace_of_a_mixture(sources: dict[str, Path], run_file: Path) -> None:
    words = (table(sources, "books", "code", "web"), mixture([(0, {"books": 1, "web": 1}), (4, {"code": 1, "web": 3})]))

    def order(*more: str) -> dict[str, object]:
        return llm_dist("data", "order", run_file, "--steps", "2:6", *words, *more, "--json").json

    whole = order("--ranks", "1")
    assert whole["hash"] == order("--ranks", "3")["hash"] != order("data.packing=best_fit")["hash"]
    assert whole["epochs_before"]["code"] == 0 < whole["epochs_after"]["code"] < 1
    found = llm_dist("data", "trace", run_file, "--step", 6, *words, "--json").json
    assert {document["source"] for document in found["documents"]} == {"code", "web"}
    assert {document["file"] for document in found["documents"]} == {"code.jsonl", "web.jsonl"}
    assert set(range(SEQUENCES_PER_STEP)) == {document["row"] for document in found["documents"]}
