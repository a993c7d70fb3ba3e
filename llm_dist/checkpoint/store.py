"""How a checkpoint is written and read: the engine's partitions on one side, files on the other.

Any rank count and any engine on the writing side, any other on the reading side: both only see ranges. No function
here is collective, none communicates but through the shared file system; all ranks call `save` with the same steps.
Knows no engine, no model and no policy (when to save, what to do about a failure).
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llm_dist.checkpoint import commit, layout
from llm_dist.checkpoint.layout import DamagedCheckpoint, Facts, Found, Manifest, RankFiles, SaveFailed
from llm_dist.checkpoint.lease import Fence, Superseded
from llm_dist.checkpoint.pieces import DataFile, Floats, Source, read_table, share_of_replica, write_data, write_durably
from llm_dist.engine.partition import Partition

_PARAMETER = "param/"


@dataclass(frozen=True)
class Saved:
    """What a call of `Store.save` did."""

    step: int
    stall_seconds: float
    """How long training stood still: all of a synchronous save, the copy to the host of an asynchronous one."""
    num_bytes: int
    """What this rank writes."""
    was_complete: bool = False
    """The step was already on disk: nothing was done."""


class Store:
    """Writes the checkpoints of one attempt, one at a time, and reads them.

    A save succeeds or fails on all ranks alike, except that a rank may time out while the others succeed: what rank 0
    says counts, and the trainer agrees on it. Not collective: rank 0 waits for the others' files.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, attempt: int, limit_seconds: float = 900.0) -> None:
        """Args: `folder` is the run's `checkpoints`; `limit_seconds` is how long rank 0 waits for the others."""
        self.folder = folder
        self._rank, self._ranks, self.attempt = rank, ranks, attempt
        self._limit_seconds = limit_seconds
        self._num_saves = 0
        self._host: Tensor | None = None
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._durable_step: int | None = None
        self._abandoned = threading.Event()
        self.fence = Fence(folder, attempt)
        """Whether this attempt may still write."""

    def take_over(self) -> None:
        """Rank 0 before anything else: older attempts that still live may write no more (`lease`).

        Raises:
            Superseded: a newer attempt has been faster.
        """
        commit.take_over(self.folder, self.attempt)

    def reserve(self, state: Mapping[str, Partition]) -> None:
        """Take the host memory of asynchronous saves now: the first of them then stalls no longer than the others."""
        self._reserve([_share(key, partition).values for key, partition in state.items()])

    def save(self, step: int, state: Mapping[str, Partition], facts: Facts, asynchronous: bool = False) -> Saved:
        """Write a checkpoint of `step`; all ranks call this with the same step, each with its own partitions.

        Asynchronous: returns once the values are copied to host memory; `poll` and `wait` tell the rest. Waits for
        an earlier save first. `facts` are rank 0's.

        Raises:
            SaveFailed: this save, or the earlier one, was not written; no trace of it is left under a final name.
            Superseded: a newer attempt has taken the run over.
        """
        started = time.perf_counter()
        self._num_saves += 1  # also where nothing comes of it, so that all ranks count alike
        self.wait()
        final = self.folder / layout.checkpoint_name(step)
        if layout.counts(final):
            return Saved(step, time.perf_counter() - started, 0, was_complete=True)
        shares = {key: _share(key, partition) for key, partition in state.items()}
        sources = self._staged(shares) if asynchronous else {key: _source(share) for key, share in shares.items()}
        self._abandoned.clear()
        self._begin(partial(self._write, step, self._num_saves, sources, facts))
        if not asynchronous:
            self.wait()
        num_bytes = sum(source.num_bytes for source in sources.values())
        return Saved(step, time.perf_counter() - started, num_bytes)

    def poll(self) -> int | None:
        """The last step this store has made durable; does not wait.

        Raises:
            SaveFailed: the save begun last was not written (raised once).
        """
        is_busy = any(thread.is_alive() for thread in self._threads)
        return self._durable_step if is_busy else self.wait()

    def wait(self) -> int | None:
        """Return when nothing is being written or deleted any more; as `poll`."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._durable_step

    def abandon(self) -> None:
        """Make the save in progress fail soon, on this rank and through it on the others; `wait` then raises."""
        self._abandoned.set()

    def sweep(self) -> list[str]:
        """Rank 0 at start-up: delete what crashed attempts left; returns the names. Does nothing on other ranks."""
        return commit.sweep(self.folder, self.attempt) if self._rank == 0 else []

    def retain(self, keep_last: int, keep_every_steps: int | None = None, best_step: int | None = None) -> None:
        """Rank 0: `commit.retain`, unless a newer attempt has taken over; beside the training while a save is, too.

        Some file systems take as long to delete a file as to write a third of it.

        Raises:
            Superseded: it has.
        """
        self.fence.check()
        delete = partial(commit.retain, self.folder, keep_last, keep_every_steps, best_step)
        if self._threads:
            self._begin(partial(self._delete, delete))
        else:
            delete()

    def amend(self, step: int, trajectory: Mapping[str, object]) -> None:
        """Rank 0: `commit.amend` the checkpoint of `step`, unless a newer attempt has taken over.

        Raises:
            Superseded: it has.
        """
        self.fence.check()
        commit.amend(self.folder / layout.checkpoint_name(step), trajectory)

    def restore(self, found: Found, state: Mapping[str, Partition]) -> Manifest:
        """`read_into` for this rank; not collective: ranks may differ in what they raise, and the trainer agrees."""
        return read_into(found.folder, state, self._rank, self._ranks)

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _delete(self, delete: Callable[[], object]) -> None:
        try:
            delete()
        except BaseException as error:  # noqa: BLE001  kept for `wait`, which raises it in the training thread
            self._failure = error

    def _staged(self, shares: Mapping[str, Partition]) -> dict[str, Source]:
        """Sources in one host buffer, kept for the next save: its size bounds the host memory taken."""
        host = self._reserve([share.values for share in shares.values()])
        on_device = host.is_pinned()
        sources, end = {}, 0
        for key, share in shares.items():
            begin, end = end, end + share.values.numel()
            staged = host[begin:end].copy_(share.values.detach(), non_blocking=on_device)
            sources[key] = _source(Partition(staged, share.start, share.shape))
        if on_device:
            torch.cuda.synchronize()
        return sources

    def _reserve(self, shares: Sequence[Tensor]) -> Tensor:
        num_elements = sum(values.numel() for values in shares)
        if self._host is None or self._host.numel() < num_elements:
            self._host = None  # before there is another one
            on_device = any(values.is_cuda for values in shares)
            self._host = torch.empty(num_elements, dtype=torch.float32, pin_memory=on_device)
            self._host.zero_()  # a page is taken when it is written first
        return self._host

    def _write(self, step: int, save: int, sources: Mapping[str, Source], facts: Facts) -> None:
        """The thread: write this rank's files, then wait for the others and publish (rank 0) or see it published."""
        final = self.folder / layout.checkpoint_name(step)
        writing = self.folder / commit.writing_name(step, self.attempt, save)
        try:
            self._write_files(writing, sources)
            if self._rank == 0:
                commit.await_tables(writing, self._ranks, self._limit_seconds, self._go_on)
                shapes, files = commit.gather_tables(writing, self._ranks)
                commit.publish(writing, final, self._manifest(step, facts, shapes, files))
                commit.sweep(self.folder, self.attempt, save)
            else:
                # Rank 0 knows who is missing: let it give up first.
                commit.await_publication(writing, final, self.attempt, 2 * self._limit_seconds, self._go_on)
            self._durable_step = step
        except BaseException as error:  # noqa: BLE001  kept for `wait`, which raises it in the training thread
            commit.give_up(writing, self._rank, self._ranks, str(error))
            self._failure = self._explained(error, final)

    def _explained(self, error: BaseException, final: Path) -> BaseException:
        """A newer attempt explains whatever went wrong: it sweeps the files of older ones away."""
        if not isinstance(error, OSError):
            return error
        try:
            self.fence.check()
        except Superseded as superseded:
            return superseded
        except OSError:
            pass  # the file system fails altogether, and the first error says it better
        failed = SaveFailed(final, error)
        failed.__cause__ = error
        return failed

    def _write_files(self, writing: Path, sources: Mapping[str, Source]) -> None:
        def go_on() -> None:
            self._go_on()
            commit.check_peers(writing)

        writing.mkdir(parents=True, exist_ok=True)
        go_on()
        table = write_data(writing, self._rank, sources, self._go_on)
        write_durably(writing / layout.table_name(self._rank), table.to_bytes())

    def _go_on(self) -> None:
        if self._abandoned.is_set():
            raise InterruptedError("the save was abandoned")
        self.fence.check_now_and_then()

    def _manifest(
        self, step: int, facts: Facts, shapes: dict[str, tuple[int, ...]], files: list[RankFiles]
    ) -> Manifest:
        return Manifest(
            step=step,
            attempt=self.attempt,
            num_ranks=self._ranks,
            optimizer_step=facts.optimizer_step,
            engine=facts.engine,
            fingerprints=dict(facts.fingerprints),
            trajectory=dict(facts.trajectory),
            state=shapes,
            files=files,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"python": platform.python_version(), "torch": torch.__version__},
        )


def read_into(folder: Path, state: Mapping[str, Partition], rank: int = 0, ranks: int = 1) -> Manifest:
    """Fill the live views of `state` with what `folder` holds, whoever wrote it.

    Reads only the pieces that overlap, each verified in the same read. Rank 0 also verifies every table and header.

    Raises:
        StateMismatch: the checkpoint has other tensors or other shapes; nothing was changed.
        DamagedCheckpoint: names file and piece; the values of `state` are then undefined.
    """
    manifest = layout.read_manifest(folder)
    layout.check_same_tensors(folder, manifest, {key: each.shape for key, each in state.items()})
    if rank == 0:
        layout.check_frame(folder, manifest)
    _fill(folder, _nearest_first(manifest.files, rank, ranks), state)
    return manifest


def read_parameters(folder: Path) -> dict[str, Tensor]:
    """All full-precision parameters by name, on the host, verified.

    Raises:
        DamagedCheckpoint: names file and piece.
    """
    manifest = layout.read_manifest(folder)
    layout.check_frame(folder, manifest)
    shapes = {key: shape for key, shape in manifest.state.items() if key.startswith(_PARAMETER)}
    state = {key: Partition(torch.empty(math.prod(shape)), 0, shape) for key, shape in shapes.items()}
    _fill(folder, manifest.files, state)
    return {key.removeprefix(_PARAMETER): each.values.view(each.shape) for key, each in state.items()}


def _share(key: str, partition: Partition) -> Partition:
    """The part of a partition that this rank writes."""
    values = partition.values
    assert values.dim() == 1 and values.dtype == torch.float32 and values.is_contiguous(), f"{key} is no flat fp32 view"
    assert 0 <= partition.start <= partition.start + values.numel() <= math.prod(partition.shape), key
    begin, end = share_of_replica(values.numel(), partition.replica, partition.num_replicas)
    return Partition(values[begin:end], partition.start + begin, partition.shape)


def _source(share: Partition) -> Source:
    return Source(share.shape, share.start, share.values.numel(), partial(_on_host, share.values))


def _on_host(values: Tensor) -> Floats:
    array: Floats = values.detach().cpu().numpy()
    return array


def _nearest_first(files: list[RankFiles], rank: int, ranks: int) -> list[RankFiles]:
    """Partitions are mostly in rank order, so what a rank needs lies with the ranks at the same share of the world."""
    return sorted(files, key=lambda each: abs((each.rank + 0.5) * ranks - (rank + 0.5) * len(files)))


def _fill(folder: Path, files: Iterable[RankFiles], state: Mapping[str, Partition]) -> None:
    """Copy from the given ranks' files, in turn, until every partition is full."""
    unfilled = {key: partition.values.numel() for key, partition in state.items() if partition.values.numel()}
    for each in files:
        if not unfilled:
            return
        table = read_table(folder, each)
        wanted = [
            (key, piece)
            for key in table.state.keys() & unfilled.keys()
            for piece in table.state[key].pieces
            if _overlap(state[key], piece.start, piece.stop)
        ]
        wanted.sort(key=lambda pair: pair[1].offset_bytes)  # the kernel reads ahead
        with DataFile(folder, each.rank) as data:
            for key, piece in wanted:
                unfilled[key] -= sum(_copy(state[key], start, chunk) for start, chunk in data.chunks(piece))
        unfilled = {key: num_elements for key, num_elements in unfilled.items() if num_elements}
    if unfilled:
        key = min(unfilled)
        raise DamagedCheckpoint(folder, f"{unfilled[key]} elements of {key} are in no piece")


def _overlap(partition: Partition, start: int, stop: int) -> bool:
    return max(start, partition.start) < min(stop, partition.start + partition.values.numel())


@torch.no_grad()
def _copy(partition: Partition, start: int, chunk: Floats) -> int:
    """Write the elements of `chunk` (the first is element `start`) that the partition holds; returns their count."""
    begin = max(start, partition.start)
    end = min(start + chunk.size, partition.start + partition.values.numel())
    if begin < end:
        target = partition.values[begin - partition.start : end - partition.start]
        target.copy_(torch.from_numpy(chunk[begin - start : end - start]))
    return max(0, end - begin)
