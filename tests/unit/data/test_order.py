import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist.data.order import LANES, POOL_CELLS, Order, keys, permute, phases, rank_rows

SIZES = st.one_of(st.integers(1, 40), st.integers(41, 5000), st.sampled_from([255, 256, 257, 1023, 1024, 1025]))


def one(secret: int) -> np.ndarray:
    return np.array([secret], np.uint64)


@given(size=SIZES, secret=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, secret: int) -> None:
    assert sorted(permute(np.arange(size), size, one(secret)).tolist()) == list(range(size))


@given(size=st.integers(1, 2**48), secret=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_a_large_range_stays_inside_and_is_random_access(size, secret, data) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    images = permute(positions, size, one(secret))
    assert images.min() >= 0
    assert images.max() < size
    assert len(set(images.tolist())) == len(positions)
    assert [int(permute(positions[i : i + 1], size, one(secret))[0]) for i in range(len(positions))] == images.tolist()


def test_the_order_never_changes_silently() -> None:
    """Golden values: a run that is resumed by a later version must read what it would have read."""
    assert keys(1, 2, 3).tolist() == [2689273366532758856]
    assert permute(np.arange(10), 10, one(7)).tolist() == [9, 7, 2, 4, 8, 1, 6, 0, 3, 5]
    assert permute(np.arange(5), 1_000_003, one(2**63)).tolist() == [420454, 582094, 842126, 648121, 92624]
    assert phases(3, np.arange(6), 1000).tolist() == [113, 835, 752, 766, 506, 811]
    assert phases(3, np.array([10**9]), 10**13).tolist() == [2398130364423]
    # Three cells of one window a lane, which are less than a pool, and eight windows that are left over.
    order = Order(200, 1, seed=3)
    assert order.windows(np.arange(6)).tolist() == [88, 119, 183, 179, 139, 176]
    assert order.windows(np.arange(190, 204)).tolist() == [155, 94, *(198, 196, 192, 197, 194, 195, 199, 193), *AGAIN]
    # A pool of four cells and one of a single cell a lane, 40 windows left over; a later epoch.
    order = Order(1000, 3, seed=2**63 - 1)
    ids = [0, 1, 63, 64, 767, 768, 959, 960, 999, 1000, 1001, 10**12]
    assert order.windows(np.array(ids)).tolist() == [606, 444, 847, 104, 195, 805, 663, 975, 963, 154, 373, 52]
    assert order.epochs(np.array(ids)).tolist() == [0] * 9 + [1, 1, 10**9]
    assert order.lanes(np.array(ids)).tolist() == [0, 1, 63, 0, 63, 0, 63, 0, 39, 0, 1, 0]


AGAIN = [22, 119, 179, 157]


def test_every_position_reaches_every_window_alike() -> None:
    images = permute(np.tile(np.arange(12), 3000), 12, keys(np.arange(3000, dtype=np.uint64)).repeat(12))
    counts = np.zeros((12, 12))
    np.add.at(counts, (np.tile(np.arange(12), 3000), images), 1)
    chi_squared = ((counts - 250) ** 2 / 250).sum()
    assert 70 < chi_squared < 185, "121 degrees of freedom: mean 121, deviation 15.6"


def test_neighbours_are_torn_apart() -> None:
    images = permute(np.arange(50_000), 50_000, keys(1)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    batch_means = images.reshape(-1, 50).mean(axis=1)
    assert 0.85 < batch_means.var() * 50 / images.var() < 1.15


# Fewer windows than a cell for each lane; whole cells only; a last pool of 1, 2 or 3 cells; windows left over.
ORDERS = st.builds(
    Order,
    num_windows=st.one_of(st.integers(1, 300), st.integers(300, 6000), st.sampled_from([LANES * 8, LANES * 9 + 1])),
    cell_windows=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)


@given(order=ORDERS, first_epoch=st.sampled_from([0, 1, 10**9]))
def test_each_window_once_per_epoch(order: Order, first_epoch: int) -> None:
    size = order.num_windows
    ids = np.arange(first_epoch * size, (first_epoch + 3) * size)
    np.testing.assert_array_equal(order.epochs(ids), first_epoch + np.repeat(np.arange(3), size))
    for windows in order.windows(ids).reshape(3, size):
        np.testing.assert_array_equal(np.sort(windows), np.arange(size))


@given(order=ORDERS, ids=st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_random_access_equals_sequence(order: Order, ids: list[int]) -> None:
    windows = order.windows(np.array(ids)).tolist()
    assert windows == [int(order.windows(np.array([g]))[0]) for g in ids]
    first = min(ids)
    in_a_row = order.windows(np.arange(first, first + 200)).tolist()
    assert [in_a_row[g - first] for g in ids if g < first + 200] == [
        window for g, window in zip(ids, windows, strict=True) if g < first + 200
    ]


def body(order: Order, epoch: int) -> np.ndarray:
    """Windows of an epoch's whole cells, as [position in the lane, lane]."""
    num_lane_windows = order.num_windows // (LANES * order.cell_windows) * order.cell_windows
    first = epoch * order.num_windows
    return order.windows(np.arange(first, first + num_lane_windows * LANES)).reshape(num_lane_windows, LANES)


@given(order=ORDERS, epoch=st.integers(0, 3))
def test_a_cell_is_read_by_one_lane_and_a_pool_of_a_lane_is_few_cells(order: Order, epoch: int) -> None:
    cells = body(order, epoch) // order.cell_windows
    lanes_of: dict[int, set[int]] = {}
    for lane, own in enumerate(cells.T):
        for cell in np.unique(own).tolist():
            lanes_of.setdefault(cell, set()).add(lane)
        pool_windows = POOL_CELLS * order.cell_windows
        for first in range(0, len(own), pool_windows):
            pool = own[first : first + pool_windows]
            assert len(np.unique(pool)) == len(pool) // order.cell_windows <= POOL_CELLS
    assert sorted(lanes_of) == list(range(order.num_windows // (LANES * order.cell_windows) * LANES))
    assert all(len(lanes) == 1 for lanes in lanes_of.values())


def test_what_is_left_over_is_less_than_a_cell_for_each_lane_and_comes_last() -> None:
    order = Order(LANES * 12 * 5 + 700, 12, seed=1)
    windows = order.windows(np.arange(order.num_windows))
    assert set(windows[-700:].tolist()) == set(range(LANES * 12 * 5, order.num_windows))


@pytest.mark.parametrize(("step_windows", "loss"), [(LANES, 1.0), (4 * LANES, 1.75), (16 * LANES, 4.75)])
def test_steps_are_mixed_as_well_as_their_cells_allow(step_windows: int, loss: float) -> None:
    """Variance of the mean position of a step's windows, against windows drawn one by one.

    A step of m windows a lane has m of the same POOL_CELLS cells: (1 + (m - 1) / POOL_CELLS) times the variance.
    """
    order = Order(LANES * 64 * 16, 16, seed=2)
    windows = np.concatenate([body(order, epoch).reshape(-1, step_windows) for epoch in range(12)])
    ratio = windows.mean(axis=1).var() * step_windows / (order.num_windows**2 / 12)
    assert 0.8 * loss < ratio < 1.2 * loss
    assert abs(np.corrcoef(windows.ravel()[:-1], windows.ravel()[1:])[0, 1]) < 0.01


def test_a_pool_is_mixed_evenly() -> None:
    """Each of a lane's next windows comes from each cell of its pool equally often."""
    order = Order(LANES * POOL_CELLS * 8, 8, seed=5)
    cells = np.stack([body(order, epoch) for epoch in range(30)]) // 8
    is_first_cell = cells == cells[:, :1]  # [epochs, windows of the pool, lanes]: as the lane's first window
    share = is_first_cell[:, 1:].mean(axis=(0, 2))
    assert np.abs(share - 7 / 31).max() < 0.05


def test_left_out_tokens_move_over_the_whole_stream() -> None:
    left_out = np.zeros(1000, np.int64)
    for phase in phases(1, np.arange(2000), 1000).tolist():
        left_out[(phase + 900 + np.arange(100)) % 1000] += 1
    assert left_out.min() > 140
    assert left_out.max() < 260


@pytest.mark.parametrize("num_windows", [97, LANES * 5 + 7])
def test_seeds_and_epochs_differ(num_windows: int) -> None:
    orders = [Order(num_windows, 1, seed).windows(np.arange(3 * num_windows)) for seed in (0, 1, 2**62)]
    assert len({tuple(epoch.tolist()) for windows in orders for epoch in windows.reshape(3, -1)}) == 9


@given(num_rows=st.integers(0, 1000), ranks=st.integers(1, 64))
def test_rank_rows_are_dealt_evenly(num_rows: int, ranks: int) -> None:
    rows = [rank_rows(num_rows, ranks, rank) for rank in range(ranks)]
    assert [row for part in rows for row in part] == list(range(num_rows))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
