"""Clusters for the tests; where this machine cannot run one, they are skipped and say why."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.conftest import corpus, run_file, run_folder, shards, tokenizer, write_run_file  # noqa: F401
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import PATH
from tests.slurm.settings import Shape

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "ip", "unshare", "nsenter", "setpriv", "ps")
_ALIVE: list[Cluster] = []


@functools.cache
def why_not_here() -> str:
    """Empty where a cluster can be started."""
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"no {', '.join(missing)} on this machine; .ci/run installs them"
    if os.geteuid():
        return "only root can give each node a network of its own"
    apart = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
    tried = subprocess.run(apart, capture_output=True, text=True, check=False)
    return f"this machine forbids namespaces: {tried.stderr}" if tried.returncode else ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slurm") and why_not_here():
        pytest.skip(why_not_here())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the daemons said stands below a failure."""
    report = yield
    if report.failed:
        report.sections += [("logs of the cluster", cluster.last_words()) for cluster in _ALIVE]
    return report


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[[Shape], Cluster]]:
    """`start_cluster(Shape(nodes=16, cpus=8, gpus=8))`: it ends with the module."""
    with ExitStack() as stack:

        def start(shape: Shape) -> Cluster:
            cluster = stack.enter_context(Cluster(shape))
            stack.callback(_ALIVE.remove, cluster)
            _ALIVE.append(cluster)
            return cluster

        yield start


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[[Shape], Cluster]) -> Cluster:
    """Three nodes. Whoever breaks one mends it."""
    return start_cluster(Shape())
