"""Which rows a step reads, of one source or of many, and how they are read: the same for any number of ranks.

A step's global set is fixed by the mixture; its rows stand in the order of their lanes, so that the slices which ranks
take are neighbouring lanes. Knows no threads and no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_dist.data import pairs
from llm_dist.data.index import ShardSet
from llm_dist.data.mixture import Mixture, Segment
from llm_dist.data.order import LANES, Indices, Order, rank_rows
from llm_dist.data.packing import Packing, Separate
from llm_dist.rows import Rows, merge


@dataclass(frozen=True)
class Source:
    """Shards that are read in an order of their own."""

    name: str
    shards: ShardSet
    packing: Packing
    order: Order


class Places(NamedTuple):
    """Where rows come from: [steps, rows] each."""

    sources: npt.NDArray[np.int16]
    epochs: Indices
    windows: Indices

    def of(self, steps: slice) -> Places:
        """Those of some of the steps, one after another: [n] each."""
        return Places(self.sources[steps].ravel(), self.epochs[steps].ravel(), self.windows[steps].ravel())


class Reading:
    """The data of a run: its sources, their mixture, and how many sequences make up a step."""

    def __init__(
        self,
        sources: Sequence[Source],
        segments: Sequence[Segment],
        sequences_per_step: int,
        sequence_tokens: int,
        *,
        document_mask: bool = False,
        pair_seed: int | None = None,
    ) -> None:
        """With a `pair_seed`, each row comes with text of another document."""
        self.sources = list(sources)
        self.mixture = Mixture([source.name for source in sources], segments, sequences_per_step)
        self.sequences_per_step = sequences_per_step
        self.sequence_tokens = sequence_tokens
        self.document_mask = document_mask
        self.pair_seed = pair_seed
        self.is_padded = sources[0].packing.is_padded
        self.is_remote = any(source.shards.is_remote for source in sources)

    def places(self, steps: range, rows: range) -> Places:
        """Where `rows` of the global sets of `steps` come from, a step being named by the steps finished before it."""
        shape = len(steps), len(rows)
        all_sources, all_ids = self._sequences(steps)
        sources, ids = (
            all_sources[:, rows.start : rows.stop].reshape(-1),
            all_ids[:, rows.start : rows.stop].reshape(-1),
        )
        epochs, windows = np.empty_like(ids), np.empty_like(ids)
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(sources == number) if len(self.sources) > 1 else slice(None)
            epochs[own] = source.order.epochs(ids[own])
            windows[own] = source.order.windows(ids[own])
        return Places(sources.reshape(shape), epochs.reshape(shape), windows.reshape(shape))

    def partners(self, steps: range, rows: range) -> Places | None:
        """Where the texts that `rows` of `steps` are paired with come from, a source below 0 meaning nowhere.

        None where rows are not paired.
        """
        if self.pair_seed is None:
            return None
        every = self.places(steps, range(self.sequences_per_step))
        documents = np.empty(every.windows.shape, np.int64)
        for number, source in enumerate(self.sources):
            own = every.sources == number
            assert isinstance(source.packing, Separate), "texts are paired where a row is of one document"
            documents[own] = source.packing.documents(every.windows[own]) * len(self.sources) + number
        chosen = pairs.partners(self.pair_seed, steps, rows, documents)
        in_step = np.arange(len(steps))[:, None]
        sources = np.where(chosen == pairs.NONE, np.int16(pairs.NONE), every.sources[in_step, chosen])
        return Places(sources, every.epochs[in_step, chosen], every.windows[in_step, chosen])

    def paired(self, rows: Rows, sources: npt.NDArray[np.int16], epochs: Indices, windows: Indices) -> Rows:
        """`rows` [n] with the texts at the partners' places [n].

        Raises:
            UserError: what they read is damaged.
        """
        has_partner = sources != pairs.NONE
        text = self.read(np.where(has_partner, sources, 0).astype(np.int16), epochs, windows)
        return rows._replace(partners=text.inputs, num_partner_tokens=np.where(has_partner, text.scored_tokens(), 0))

    def _sequences(self, steps: range) -> tuple[npt.NDArray[np.int16], Indices]:
        """Source and sequence id of every row of `steps`: [steps, S] each, sorted by lane, then source, then id."""
        counts = self.mixture.counts_after(steps)
        given = np.diff(counts, axis=0)
        # What a source gives to a run of steps is a run of its ids.
        ids = [np.arange(first, end, dtype=np.int64) for first, end in zip(counts[0], counts[-1], strict=True)]
        lanes = [source.order.lanes(own) for source, own in zip(self.sources, ids, strict=True)]
        step_of = [np.repeat(np.arange(len(steps)), given[:, number]) for number in range(len(ids))]
        by_row = np.argsort(np.concatenate(step_of) * LANES + np.concatenate(lanes), kind="stable")
        sources = np.repeat(np.arange(len(ids), dtype=np.int16), given.sum(axis=0))
        shape = len(steps), self.sequences_per_step
        return sources[by_row].reshape(shape), np.concatenate(ids)[by_row].reshape(shape)

    def read(self, sources: npt.NDArray[np.int16], epochs: Indices, windows: Indices) -> Rows:
        """The rows at places [n].

        Raises:
            UserError: what they read is damaged.
        """
        if len(self.sources) == 1 or not len(sources):
            rows = self.sources[0].packing.rows(epochs, windows, self.document_mask)
        else:
            chosen = [(number, np.flatnonzero(sources == number)) for number in np.unique(sources).tolist()]
            parts = [
                (own, self.sources[number].packing.rows(epochs[own], windows[own], self.document_mask))
                for number, own in chosen
            ]
            rows = merge(parts, len(sources))
        return rows._replace(sources=sources)

    def epochs(self, step: int) -> dict[str, float]:
        """Epochs of each source that are read when `step` steps are finished."""
        counts = self.mixture.counts(step)
        return {
            source.name: count / source.order.num_windows for source, count in zip(self.sources, counts, strict=True)
        }

    def rank_rows(self, ranks: int, rank: int) -> range:
        """The rows of every step's set that `rank` computes."""
        return rank_rows(self.sequences_per_step, ranks, rank)

    def order_hash(self, steps: range, ranks: int = 1) -> str:
        """sha256 of what `steps` read: in global row order each row's inputs, then what follows them, as int64 LE.

        It is computed through the slices that `ranks` ranks would read, so equal hashes mean equal data for any ranks.
        """
        digest = hashlib.sha256()
        for step in steps:
            for rank in range(ranks):
                own = self.rank_rows(ranks, rank)
                places = self.places(range(step, step + 1), own)
                rows = self.read(*(each[0] for each in places))
                digest.update(rows_content(rows))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of every source's files."""
        for source in self.sources:
            source.shards.close()


def rows_content(rows: Rows) -> bytes:
    """What `Reading.order_hash` hashes; of padding it takes the zeros that stand there."""
    pairs = np.stack([rows.inputs, rows.following], axis=1).astype("<i8")
    return pairs.tobytes()


def segments_by_size(sources: Mapping[str, int]) -> list[Segment]:
    """The mixture that reads every source at the same rate: weights are its windows."""
    from fractions import Fraction

    return [Segment(0, {name: Fraction(num_windows) for name, num_windows in sources.items()})]
