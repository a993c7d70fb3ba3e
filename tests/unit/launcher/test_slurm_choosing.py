"""Nodes for the ranks, with a check that says what a test wants to hear."""

import json
import sys
import time

from launcher.preflight.exclusions import exclude, excluded
from launcher.slurm.choosing import check, choose

NODES = ("node1", "node2", "node3")
VERDICT = """
import json, sys
from pathlib import Path
_, module, run, _, incarnation, _, nodes = sys.argv
folder = Path(run) / "preflight" / incarnation
folder.mkdir(parents=True)
(folder / "asked").write_text(nodes)
(folder / "verdict.json").write_text(json.dumps({{"facts": [], "faults": {faults}}}))
"""


def checked(run, faults, wanted=2, nodes=NODES):
    program = VERDICT.format(faults=faults)
    return check(run, nodes, wanted, 24.0, lambda names: [sys.executable, "-c", program], "7.0")


def fault(node, blamed=True):
    return {"nodes": [node], "what": "is slow", "blamed": blamed}


def test_the_first_good_nodes_are_chosen_and_a_blamed_one_is_kept_out(tmp_path) -> None:
    assert checked(tmp_path, [fault("node1")]).nodes == ("node2", "node3")
    assert [(each.node, each.reason) for each in excluded(tmp_path, time.time(), 24.0)] == [("node1", "is slow")]


def test_without_a_spare_a_node_is_missing(tmp_path) -> None:
    found = checked(tmp_path, [fault("node3")], wanted=3)
    assert (found.missing, found.mistake) == (1, None)


def test_a_fault_with_nobody_to_blame_is_for_the_user(tmp_path) -> None:
    found = checked(tmp_path, json.dumps([fault("node3", blamed=False)]).replace("false", "False"))
    assert (found.nodes, found.mistake) == ((), "node3: is slow")
    assert excluded(tmp_path, time.time(), 24.0) == []


def test_nodes_kept_out_are_not_asked_again_until_that_expires(tmp_path) -> None:
    exclude(tmp_path, "node1", "was slow", time.time())
    assert checked(tmp_path, []).nodes == ("node2", "node3")
    assert (tmp_path / "preflight" / "7.0" / "asked").read_text() == "node2,node3"
    exclude(tmp_path, "node1", "was slow", time.time() - 25 * 3600)
    assert choose(tmp_path, NODES, 2, 24.0).nodes == ("node1", "node2")


def test_too_few_left_need_no_check(tmp_path) -> None:
    exclude(tmp_path, "node1", "was slow", time.time())
    assert checked(tmp_path, [], wanted=3).missing == 1
    assert not (tmp_path / "preflight").exists()


def test_a_check_that_comes_to_no_verdict_starts_nothing(tmp_path) -> None:
    found = check(tmp_path, NODES, 2, 24.0, lambda names: ["true"], "7.0")
    assert found.mistake is not None and "no verdict" in found.mistake
