"""Who is to blame: certain of one node, or honest that it is not known."""

from dataclasses import replace

import pytest

from launcher.preflight.facts import Device, NodeFacts, from_json
from launcher.preflight.gpus import Gpu
from launcher.preflight.judge import Limits, judge

GIB = 2**30
H100 = Device("NVIDIA H100", True, 600e12)
CPU = Device("x86_64", False, 1e11)
HEALTHY_GPU = Gpu(0, "NVIDIA H100", "570.86.15", 80 * GIB, 0, False)


def facts_of(node, **changed):
    sound = NodeFacts(
        node=node,
        host=node,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        code="ab" * 32,
        clock_seconds=1000.0,
        unseen=(),
        disk_bytes=100 * GIB,
        temporary_bytes=50 * GIB,
        memory_bytes=64 * GIB,
        gpus=None,
        devices=(CPU,),
        problems=(),
    )
    return replace(sound, **changed)


def job(count, **nodes):
    """`count` sound nodes a, b, c, ... with the changes given by name."""
    return [facts_of(name, **nodes.get(name, {})) for name in "abcdefgh"[:count]]


def judged(facts, limits=None):
    return judge(facts, [each.node for each in facts], limits or Limits())


def only(facts, limits=None):
    (fault,) = judged(facts, limits)
    return fault


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_sound_nodes_have_no_faults(count):
    assert judged(job(count)) == []
    gpus = {"gpus": (HEALTHY_GPU,), "devices": (H100,)}
    assert judged(job(count, **dict.fromkeys("abcdefgh", gpus))) == []


OUTVOTED = [
    {"versions": {"python": "3.11.7", "torch": "2.12.0"}},
    {"versions": {"python": "3.11.7"}},
    {"versions": {"python": "3.11.7", "torch": "2.13.0", "driver": "570.86.15"}},
    {"code": "cd" * 32},
    {"clock_seconds": 1006.0},
    {"clock_seconds": 994.0},
    {"devices": (replace(CPU, flops_per_second=0.39e11),)},
    {"devices": (replace(CPU, name="aarch64"),)},
]


@pytest.mark.parametrize("changed", OUTVOTED)
def test_the_one_that_differs_from_most_is_blamed(changed):
    fault = only(job(3, b=changed))
    assert (fault.nodes, fault.blamed) == (("b",), True)


@pytest.mark.parametrize("changed", OUTVOTED)
def test_of_two_that_differ_both_are_named_and_none_is_blamed(changed):
    fault = only(job(2, b=changed))
    assert (sorted(fault.nodes), fault.blamed) == (["a", "b"], False)


@pytest.mark.parametrize("changed", OUTVOTED)
def test_of_four_that_differ_two_and_two_none_is_blamed(changed):
    fault = only(job(4, b=changed, d=changed))
    assert (sorted(fault.nodes), fault.blamed) == (["a", "b", "c", "d"], False)


@pytest.mark.parametrize("changed", OUTVOTED)
def test_a_single_node_differs_from_nobody(changed):
    assert judged(job(1, a=changed)) == []


def test_what_differs_is_said_with_both_values():
    fault = only(job(3, b={"versions": {"python": "3.11.7", "torch": "2.12.0"}}))
    assert fault.what == "different torch: 2.12.0 on b, 2.13.0 on most"


@pytest.mark.parametrize(
    ("least", "passes"),
    [(1005.0, True), (1005.1, False), (995.0, True), (994.9, False)],
)
def test_clocks_may_be_off_by_the_limit(least, passes):
    assert (judged(job(3, c={"clock_seconds": least})) == []) == passes


def test_a_slow_gpu_is_found_among_its_own_neighbours():
    slow = replace(H100, flops_per_second=470e12)
    (fault,) = judged(job(1, a={"devices": (H100, H100, slow, H100)}))
    assert (fault.nodes, fault.blamed) == (("a",), True)
    assert "78%" in fault.what
    nearly = replace(H100, flops_per_second=490e12)
    assert judged(job(1, a={"devices": (H100, H100, nearly, H100)})) == []


def test_a_node_with_fewer_gpus_than_most_is_blamed():
    gpus = {name: {"devices": (H100, H100)} for name in "abc"}
    fault = only(job(3, **{**gpus, "c": {"devices": (H100,)}}))
    assert (fault.nodes, fault.what, fault.blamed) == (("c",), "different numbers of GPUs: 1 on c, 2 on most", True)


def test_with_the_number_of_gpus_wanted_one_of_two_is_blamed():
    both = job(2, a={"devices": (H100, H100)}, b={"devices": (H100,)})
    fault = only(both, Limits(gpus=2))
    assert (fault.nodes, fault.what, fault.blamed) == (("b",), "torch sees 1 GPUs, 2 wanted", True)


OWN = [
    {"memory_bytes": GIB},
    {"temporary_bytes": GIB // 2},
    {"problems": ("nvidia-smi gave no answer in 20 s",)},
    {"problems": ("torch measured no matmul: out of memory",), "devices": (), "versions": {"python": "3.11.7"}},
    {"devices": ()},
]


@pytest.mark.parametrize("changed", OWN)
def test_what_a_node_lacks_by_itself_blames_it_also_of_two(changed):
    fault = only(job(2, b=changed), Limits())
    assert (fault.nodes, fault.blamed) == (("b",), True)
    assert only(job(1, a=changed)).blamed


@pytest.mark.parametrize("limits", [Limits(), Limits(gpus=1)])
def test_a_node_whose_gpus_could_not_be_measured_has_one_fault(limits):
    broken = {"problems": ("torch measured no matmul: CUDA error",), "versions": {"python": "3.11.7"}, "devices": ()}
    fault = only(job(2, a={"devices": (H100,)}, b=broken), limits)
    assert (fault.nodes, fault.blamed) == (("b",), True)


@pytest.mark.parametrize("changed", OWN)
def test_what_all_nodes_lack_is_no_nodes_fault(changed):
    fault = only(job(3, a=changed, b=changed, c=changed))
    assert (fault.nodes, fault.blamed) == (("a", "b", "c"), False)


@pytest.mark.parametrize("free", [GIB, None])
def test_a_full_shared_disk_stops_the_start_and_blames_no_node(free):
    fault = only(job(3, b={"disk_bytes": free}))
    assert (fault.nodes, fault.blamed) == (("b",), False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ecc_errors": 3}, "3 uncorrected ECC errors"),
        ({"must_be_reset": True}, "must be reset"),
        ({"unreadable": ("memory.total [GPU is lost]",)}, "ill: memory.total [GPU is lost]"),
    ],
)
def test_an_ill_gpu_blames_its_node(changed, said):
    gpus = {name: {"gpus": (HEALTHY_GPU,), "devices": (H100,)} for name in "ab"}
    gpus["b"]["gpus"] = (replace(HEALTHY_GPU, **changed),)
    fault = only(job(2, **gpus))
    assert (fault.nodes, fault.blamed) == (("b",), True)
    assert said in fault.what


@pytest.mark.parametrize("count", [2, 3])
def test_a_node_without_a_measurement_is_a_fault(count):
    facts = [replace(each, clock_seconds=None, unseen=("b",)) for each in job(count) if each.node != "b"]
    missing, clocks = judge(facts, list("abc"[:count]), Limits())
    assert (missing.nodes, missing.blamed) == (("b",), True)
    assert (clocks.nodes, clocks.blamed) == (tuple(each.node for each in facts), False)


def test_a_judge_who_sees_none_of_several_is_as_suspect_as_they_are():
    fault, _ = judge([facts_of("a", clock_seconds=None, unseen=("b", "c"))], ["a", "b", "c"], Limits())
    assert (fault.nodes, fault.blamed) == (("a", "b", "c"), False)


def faults_of_sight(facts):
    return [(each.nodes, each.blamed) for each in judged(facts) if "clocks" not in each.what]


def test_who_is_unseen_by_most_or_does_not_see_what_most_see():
    late = {"unseen": ("c",), "clock_seconds": None}
    assert faults_of_sight(job(3, a=late, b=late)) == [(("c",), True)]
    assert faults_of_sight(job(3, a=late)) == [(("a",), True)]
    assert faults_of_sight(job(2, b={"unseen": ("a",), "clock_seconds": None})) == [(("a", "b"), False)]


def test_facts_survive_the_way_through_json():
    sent = facts_of("a", gpus=(replace(HEALTHY_GPU, unreadable=("x",)),), unseen=("b",), clock_seconds=None)
    assert from_json(sent.to_json()) == sent
