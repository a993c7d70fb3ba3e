"""What torch's flight recorder tells of a collective that waits. A fake plays NCCL's: no GPU has seen this yet."""

import json
import threading

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from llm_dist.train import flight


def entry(number, is_over, name):
    return {"collective_seq_id": number, "profiling_name": name, "retired": is_over}


def table(enqueued, completed, *entries):
    status = {"last_enqueued_collective": enqueued, "last_completed_collective": completed}
    return json.dumps({"pg_status": {"0": status}, "entries": list(entries)}).encode()


@pytest.fixture
def gloo_of_two():
    """A process group that thinks it is two; its other rank comes when `join` is called."""
    store = dist.HashStore()
    groups = {}

    def make(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups


def test_gloo_tells_in_which_collective_a_rank_waits(gloo_of_two):
    assert flight.pending() == ""
    waiting = gloo_of_two[0].allreduce([torch.ones(3)])
    assert flight.pending() == "gloo:all_reduce"
    gloo_of_two[1].allreduce([torch.ones(3)]).wait()
    waiting.wait()


@pytest.mark.parametrize(
    ("nccl", "expected"),
    [
        (table(8, 8, entry(8, True, "nccl:all_reduce")), ""),
        (table("9", "8", entry(8, True, "nccl:a"), entry(9, False, "nccl:reduce_scatter")), "nccl:reduce_scatter"),
        (table(9, 8), "a collective"),
        (b"{", None),
        (b'{"pg_status": {"0": {}}}', None),
    ],
    ids=["none", "one", "not recorded", "no JSON", "another format"],
)
def test_nccl_is_read_alike_and_a_strange_answer_is_no_answer(monkeypatch, nccl, expected):
    monkeypatch.delattr(c10d, "_dump_fr_trace_json")
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: nccl, raising=False)
    assert flight.pending() == expected


def test_a_torch_without_recorders_tells_nothing(monkeypatch, tmp_path):
    for name in ("_dump_fr_trace_json", "_dump_fr_trace"):
        monkeypatch.delattr(c10d, name)
    assert flight.pending() is None
    flight.dump(tmp_path / "flight", 3)
    assert not (tmp_path / "flight").exists()


def test_what_the_recorders_hold_is_written_where_torchs_reader_looks(monkeypatch, tmp_path):
    monkeypatch.setattr(c10d, "_dump_nccl_trace", lambda: b"of the GPU", raising=False)
    flight.dump(tmp_path / "flight", 3)
    assert sorted(path.name for path in (tmp_path / "flight").iterdir()) == ["gloo_trace_rank_3", "nccl_trace_rank_3"]
    assert (tmp_path / "flight" / "nccl_trace_rank_3").read_bytes() == b"of the GPU"


def test_recorders_remember_unless_the_user_has_said_how_much(monkeypatch):
    for name in flight._SIZES:
        monkeypatch.delenv(name, raising=False)
    flight.record()
    assert flight.os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    flight.record()
    assert "TORCH_FR_BUFFER_SIZE" not in flight.os.environ
