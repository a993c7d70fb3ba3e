"""Who is to blame for a network that is wrong or slow, and when nobody is."""

from launcher.preflight.network import judge_network

NODES = ("node1", "node2", "node3", "node4")
RING = ((0, 1), (1, 2), (2, 3), (3, 0))


def reports(slow=(), wrong=(), missing=(), rates=None):
    """Of one rank on each node; links in `slow` carry a tenth."""
    found = {}
    for rank in range(len(NODES)):
        ends = [pair for pair in RING if rank in pair]
        links = {str(sum(pair) - rank): 1e9 if pair in slow else 1e10 for pair in ends}
        found[rank] = {"rank": rank, "num_wrong": int(rank in wrong), "links": links}
    return {rank: report for rank, report in found.items() if rank not in missing}


def judged(**cases):
    return [(fault.nodes, fault.blamed) for fault in judge_network(reports(**cases), NODES, 1)]


def test_a_sound_network_has_no_faults() -> None:
    assert judged() == []


def test_a_node_whose_links_are_all_slow_is_to_blame_and_its_neighbours_are_not() -> None:
    assert judged(slow=[(1, 2), (2, 3)]) == [(("node3",), True)]


def test_of_one_slow_link_nobody_knows_which_end_is_at_fault() -> None:
    assert judged(slow=[(1, 2)]) == [(("node2", "node3"), False)]
    [fault] = judge_network(reports(slow=[(1, 2)]), NODES, 1)
    assert fault.what == "the link between them carries 1 GB/s; half of the median node's are 5 GB/s"


def test_a_wrong_sum_names_those_that_see_it_and_blames_them_where_they_are_few() -> None:
    assert judged(wrong=[3]) == [(("node4",), True)]
    assert judged(wrong=[0, 1, 2, 3]) == [(NODES, False)]


def test_ranks_without_a_report_name_their_nodes() -> None:
    assert judged(missing=[1]) == [(("node2",), True)]
    assert judged(missing=[0, 1, 2, 3]) == [(NODES, False)]


def test_a_node_is_known_by_any_of_its_ranks() -> None:
    ring = {rank: {**reports()[0], "rank": rank, "links": {}} for rank in range(4)}
    ring[3]["num_wrong"] = 2
    [fault] = judge_network(ring, ("a", "b"), 2)
    assert (fault.nodes, fault.blamed) == (("b",), False), "of two nodes that differ nobody knows which is right"
