"""One launcher per node against one task per rank, on a real Slurm: how fast each ends, and what it tells.

A job is warned of its limit, or one of its ranks is killed.

Needs root and Slurm, as `make test-slurm` does. The cluster's nodes share this machine's cores: compare, do not quote.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.attempts import heartbeat
from launcher.slurm import starts
from tests.slurm.cluster import Cluster
from tests.slurm.settings import Shape

ROOT = Path(__file__).parents[1]
NODES, RANKS, ROUNDS, FIRST_STEPS = 2, 2, 3, 20
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. "
RUN_FILE = """
run = {{name = "tiny", dir = "{folder}/runs", steps = 100000}}
model = {{layers = 2, d_model = 32, heads = 2, max_sequence_tokens = 64}}
data = {{train = "{folder}/shards/train", sequence_tokens = 32}}
batch = {{tokens_per_step = 256, sequences_per_micro_batch = 2}}
optim = {{lr = 1e-3}}
engine = {{precision = "fp32", compile = "off"}}
checkpoint = {{every_steps = 100000}}
"""


def measure() -> list[dict[str, Any]]:
    """One row per way and event: seconds (median, lowest, highest) and what the job tells afterwards."""
    rows: dict[tuple[str, str], list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder, Cluster(Shape(nodes=NODES)) as cluster:
        cluster.environment["OMP_NUM_THREADS"] = "1"
        base = Path(folder)
        _prepare(cluster, base)
        for number in range(ROUNDS):
            for way, submit in (("launcher per node", _by_launcher), ("task per rank", _by_batch_file)):
                for event, strike in (("warned", _warn), ("rank killed", _kill)):
                    run = base / "runs" / f"{submit.__name__}{strike.__name__}{number}"
                    rows.setdefault((way, event), []).append(_one(cluster, base, run, submit, strike))
    return [
        {
            "way": way,
            "event": event,
            "seconds": statistics.median(seconds for seconds, _ in found),
            "lowest": min(seconds for seconds, _ in found),
            "highest": max(seconds for seconds, _ in found),
            "known": found[-1][1],
        }
        for (way, event), found in rows.items()
    ]


def _prepare(cluster: Cluster, base: Path) -> None:
    (base / "text.txt").write_text("\n\n".join(f"{number} {TEXT}" * 20 for number in range(200)))
    (base / "run.toml").write_text(RUN_FILE.format(folder=base))
    (base / "site.toml").write_text("check = false\nsignal_seconds = 60\nrequeue = false\n")
    words = ["tokenizer", "train", base / "text.txt", "--type", "byte-bpe", "--vocab-size", 270, "--out", base / "tok"]
    _llm_dist(cluster, *words)
    _llm_dist(cluster, "tokenize", base / "text.txt", "--tokenizer", base / "tok", "--out", base / "shards")


def _llm_dist(cluster: Cluster, *words: object) -> None:
    cluster.run(sys.executable, "-m", "llm_dist", *map(str, words), seconds=120)


def _by_launcher(cluster: Cluster, base: Path, run: Path) -> str:
    words = [sys.executable, "-m", "launcher.cli", "slurm", base / "run.toml", "--nodes", NODES, "--time", 10, "--json"]
    words += ["--ranks-per-node", RANKS, "--site", base / "site.toml", f"run.name={run.name}"]
    return str(json.loads(cluster.run(*map(str, words), seconds=90).splitlines()[-1])["jobs"][0])


def _by_batch_file(cluster: Cluster, base: Path, run: Path) -> str:
    variables = f"RUN={base}/run.toml,RANKS={RANKS},PYTHON={sys.executable},OVERRIDES=run.name={run.name}"
    options = ["--no-requeue", f"--nodes={NODES}", "--time=10", f"--chdir={base}", f"--export=ALL,{variables}"]
    return cluster.run("sbatch", "--parsable", *options, str(ROOT / "slurm" / "train.sbatch")).strip()


def _warn(cluster: Cluster, job: str) -> None:
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def _kill(cluster: Cluster, _job: str) -> None:
    ranks = [each.pid for each in cluster.node("node2").processes() if "llm_dist train" in each.command]
    os.kill(max(ranks), signal.SIGKILL)


def _one(
    cluster: Cluster,
    base: Path,
    run: Path,
    submit: Callable[[Cluster, Path, Path], str],
    strike: Callable[[Cluster, str], None],
) -> tuple[float, str]:
    job = submit(cluster, base, run)
    _wait(lambda: (heartbeat(run) or {}).get("step", 0) > FIRST_STEPS)
    began = time.monotonic()
    strike(cluster, job)
    _wait(lambda: _is_known(cluster, run))
    seconds = time.monotonic() - began
    cluster.run("scancel", job)
    ended = cluster.wait_for_state(job, {"COMPLETED", "CANCELLED", "FAILED"}, 60)
    _wait(lambda: not any(node.processes() for node in cluster.nodes))
    if strike is _warn:
        return seconds, ""
    failures = [str(start.failure) for start in starts.read_all(run)[:1]]
    return seconds, failures[0] if failures else f"exit code {ended['ExitCode']}"


def _is_known(cluster: Cluster, run: Path) -> bool:
    """All ranks have gone or, where there is a supervisor, it has said how the first start ended."""
    if history := starts.read_all(run):
        return history[0].ended is not None
    return not any("llm_dist train" in each.command for node in cluster.nodes for each in node.processes())


def _wait(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("a job did not do what was waited for")
        time.sleep(0.05)
