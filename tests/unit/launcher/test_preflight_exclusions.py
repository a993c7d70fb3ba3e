"""Nodes a run keeps away from."""

import pytest

from launcher.preflight.exclusions import Exclusion, exclude, excluded
from llm_dist.errors import UserError

HOUR = 3_600.0


def test_none_at_first(tmp_path):
    assert excluded(tmp_path, 0.0, 24) == []


def test_kept_until_it_expires(tmp_path):
    exclude(tmp_path, "node2", "slow matmul", 1000.0)
    exclude(tmp_path, "node3", "ECC errors", 1000.0 + HOUR)
    second, third = Exclusion("node2", "slow matmul", 1000.0), Exclusion("node3", "ECC errors", 1000.0 + HOUR)
    assert excluded(tmp_path, 1000.0 + 2 * HOUR - 1, 2) == [second, third]
    assert excluded(tmp_path, 1000.0 + 2 * HOUR, 2) == [third]
    assert excluded(tmp_path, 1000.0 + 3 * HOUR, 2) == []
    assert excluded(tmp_path, 1000.0 + HOUR, 0) == []


def test_excluded_again_it_counts_from_then(tmp_path):
    exclude(tmp_path, "node2", "slow matmul", 1000.0)
    exclude(tmp_path, "node2", "ECC errors", 1000.0 + HOUR)
    assert excluded(tmp_path, 1000.0 + 2 * HOUR, 2) == [Exclusion("node2", "ECC errors", 1000.0 + HOUR)]


def test_nothing_else_is_left_beside_the_file(tmp_path):
    exclude(tmp_path, "node2", "slow matmul", 1000.0)
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["excluded.json"]


@pytest.mark.parametrize("text", ["", "{", "{}", '[{"node": "node2"}]', '[{"node": 1, "reason": "x", "since": 0}]'])
def test_a_broken_file_is_named_and_not_overwritten(tmp_path, text):
    exclude(tmp_path, "node2", "slow matmul", 1000.0)
    path = tmp_path / "slurm" / "excluded.json"
    path.write_text(text)
    for use in (lambda: excluded(tmp_path, 0.0, 24), lambda: exclude(tmp_path, "node3", "x", 0.0)):
        with pytest.raises(UserError, match=r"slurm/excluded\.json"):
            use()
    assert path.read_text() == text
