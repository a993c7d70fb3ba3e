"""Real runs, killed at random again and again: no acknowledged step is lost, and the end is the undisturbed one.

`make test-kill N=60 SEED=7`. The end is compared with a run of the same layout that was never killed: every weight and
moment, every step's loss, rate and tokens, every evaluation. No rank may crash, least of all one whose neighbour died.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llm_dist import metrics
from llm_dist.checkpoint import layout
from llm_dist.engine.blocks import COMPILER, has_compiler
from tests.e2e.commands import LAUNCH, assert_same_end, run
from tests.kill.plan import KILLS, KINDS, LONG_FORM, PHASES, Kill, Setting, settings
from tests.kill.report import Report
from tests.kill.victim import EVERY_STEPS, RANKS, Victim

pytestmark = [pytest.mark.kill, pytest.mark.timeout(1800)]

STEPS = 240
STOPPED = 75
WORDS = (
    *(f"run.steps={STEPS}", "checkpoint.every_steps=7", f"eval.every_steps={EVERY_STEPS}", "eval.max_sequences=160"),
    "model.dropout=0.1",
)
ENGINES = {
    "plain": ("engine.name=plain",),
    "zero2": ("engine.name=zero", "engine.zero_stage=2"),
    "fsdp": ("engine.name=fsdp",),
}
CRASH = re.compile(r"Traceback \(most recent call last\)|terminate called|Fatal Python error|Segmentation fault")
REPORT = Report()


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    REPORT.show()


@pytest.fixture(scope="module", autouse=True)
def compiled_before(tmp_path_factory):
    """What has been compiled once is found again by later runs and attempts, as it is where a run is started again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def words(write_run_file, shards) -> Callable[[Path, Setting], tuple[object, ...]]:
    """`words(folder, setting)`: the run file and overrides of a run in `folder`."""

    def make(folder: Path, setting: Setting) -> tuple[object, ...]:
        compiling = f"engine.compile={'on' if setting.compiles else 'off'}"
        own = (*ENGINES[setting.engine], compiling, f"data.holdout={shards}/train")
        return (write_run_file(folder), *WORDS, *own)

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, words) -> Callable[[Setting], tuple[Path, float]]:
    """`undisturbed(setting)`: folder of the run that was never killed, and how long its ranks took to begin."""
    made: dict[tuple[str, bool], tuple[Path, float]] = {}

    def make(setting: Setting) -> tuple[Path, float]:
        key = setting.engine, setting.compiles
        if key not in made:
            folder = tmp_path_factory.mktemp(f"undisturbed-{setting.engine}")
            since = time.time()
            said = run([*LAUNCH, "--ranks", str(RANKS), *words(folder, setting)])
            assert said.code == 0, said.err
            run_folder = folder / "runs" / "tiny"
            assert_nobody_crashed([*(run_folder / "logs").iterdir()])
            begun = (run_folder / "metrics.jsonl").stat().st_ctime - since
            seconds = sum(line["seconds"]["all"] for line in metrics.read(run_folder / "metrics.jsonl") if "lr" in line)
            made[key] = run_folder, max(1.0, begun - seconds)
        return made[key]

    return make


@pytest.mark.parametrize("setting", settings(), ids=str)
def test_killed_anywhere_the_end_is_the_undisturbed_one(setting: Setting, tmp_path, words, undisturbed):
    if setting.compiles and not has_compiler("cpu"):
        pytest.skip(f"compiling needs {COMPILER}")
    expected, begin_seconds = undisturbed(setting)
    saving = f"checkpoint.asynchronous={str(setting.asynchronous).lower()}"
    left = list(setting.kills)
    while left:  # in another run where one has finished early
        num_left = len(left)
        folder = tmp_path / str(num_left)
        folder.mkdir()
        victim = Victim(setting, (*words(folder, setting), saving), folder / "runs" / "tiny")
        victim.start()
        try:
            while left and victim.step < STEPS:
                if one_kill(victim, left[0], begin_seconds):
                    left.pop(0)
            finish(victim)
        finally:
            victim.close()
        assert_nothing_is_left(victim)
        assert_nobody_crashed([*victim.logs, *([victim.output] if is_ours(victim) else [])])
        assert_no_acknowledged_step_is_lost(victim)
        assert_same_run(victim.run_folder, expected)
        REPORT.count_run(victim.starts, num_left - len(left))


def one_kill(victim: Victim, kill: Kill, begin_seconds: float) -> bool:
    """Strike once; False where the run had ended before it could be struck."""
    if not victim.meet_new_ranks() or not victim.come_to(kill, begin_seconds):
        check_code(victim, victim.end_of_launcher())
        victim.vanish()
        victim.start()
        return False
    landed = victim.phase()
    victim.strike(kill)
    show(victim, kill, landed)
    REPORT.count_kill(kill.kind, landed, victim.vanish())
    ends_launcher = "launcher" in kill.kind or (kill.kind == "SIGTERM one rank" and is_ours(victim))
    if ends_launcher or landed == "shutdown":
        check_code(victim, victim.end_of_launcher())
        victim.start()
    return True


def is_ours(victim: Victim) -> bool:
    """torchrun starts again after whatever code; llm-launch knows that a rank was asked to stop."""
    return victim.setting.program == "llm-launch"


def show(victim: Victim, kill: Kill, landed: str) -> None:
    words = f"{kill.kind} in {landed} (aimed at {kill.aim}), after the checkpoint at step {victim.step}"
    print(f"{victim.setting.number}: {words}", file=sys.stderr, flush=True)


def check_code(victim: Victim, code: int) -> None:
    """llm-launch says in its exit code how it ended, except where it was itself killed."""
    if is_ours(victim):
        assert code in (0, STOPPED, -signal.SIGKILL), f"exit code {code}; {victim.output}"


def finish(victim: Victim) -> None:
    """Let it go on to its end; the last start is one of a run that is not killed any more."""
    if victim.end_of_launcher() != 0:
        victim.start()
        assert victim.end_of_launcher() == 0, victim.output.read_text()


def assert_nothing_is_left(victim: Victim) -> None:
    here = str(victim.run_folder.parent.parent)
    for process in psutil.process_iter(["cmdline"]):
        assert not any(here in word for word in process.info["cmdline"] or ()), f"left running: {process}"
    names = [path.name for path in (victim.run_folder / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith(".writing-") or "damaged" in name], names


def assert_nobody_crashed(logs: list[Path]) -> None:
    """A rank that loses its neighbour says so in one line; one that is asked to stop leaves in order."""
    for log in logs:
        found = CRASH.search(text := log.read_text(errors="replace"))
        assert found is None, f"{log}: {text[max(0, found.start() - 500) : found.start() + 3000]}"


def assert_no_acknowledged_step_is_lost(victim: Victim) -> None:
    """Each attempt begins at or after every step that was said to be saved before."""
    saved = 0
    text = victim.log.read_text(errors="replace")
    for word, resumed in re.findall(r"saved step (\d+)|attempt \d+: (?:resumed at step (\d+)|begins)", text):
        if word:
            REPORT.acknowledged += 1
            saved = max(saved, int(word))
        elif int(resumed or 0) < saved:
            REPORT.lost += 1
    assert REPORT.lost == 0, victim.log
    assert saved == STEPS


def assert_same_run(run_folder: Path, expected: Path) -> None:
    assert_same_end(run_folder, expected)
    assert lines(run_folder) == lines(expected)
    ours, theirs = (layout.read_manifest(layout.find(each).folder).trajectory for each in (run_folder, expected))
    assert ours == theirs


def lines(run_folder: Path) -> list[dict[str, object]]:
    """Of each record what is a function of the run alone."""
    keys = ("step", "loss_nats", "grad_norm", "lr", "tokens", "eval")
    return [{key: line.get(key) for key in keys} for line in metrics.read(run_folder / "metrics.jsonl")]


def test_the_kills_were_spread_over_all_phases_and_kinds():
    hit_kinds, hit_phases = ({key[place] for key in REPORT.landed} for place in (0, 1))
    assert len(hit_kinds) == min(KILLS, len(KINDS))
    if KILLS >= LONG_FORM:
        assert hit_phases == set(PHASES), f"never hit: {set(PHASES) - hit_phases}"
