"""Where every chunk of a shard folder lies: in the token stream, in its shard, and among the checksums.

Pure arithmetic over the index; about 100 bytes per chunk of a million tokens. Reads no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llm_dist.data.folder import BLOCK_TOKENS, CONTINUES, DTYPES, blocks_of, checksum
from llm_dist.errors import UserError

Integers = npt.NDArray[np.integer[Any]]


class Chunks:
    """The chunks of one shard folder, numbered over all its shards."""

    def __init__(
        self, shown: str, dataset: dict[str, Any], rows: np.ndarray, checksums: npt.NDArray[np.uint64]
    ) -> None:
        """`shown` names the folder in messages; `rows` is the index and `checksums` has one number per block."""
        self.shown = shown
        self.rows = rows
        self.checksums = checksums
        self.dtype: np.dtype[Any] = DTYPES[dataset["dtype"]]
        self.shards: list[dict[str, Any]] = dataset["shards"]
        self.shard_of = np.repeat(
            np.arange(len(self.shards), dtype=np.int32), [shard["num_chunks"] for shard in self.shards]
        )
        self.num_tokens = rows["num_tokens"].astype(np.int64)
        self.first_token = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.num_tokens, out=self.first_token[1:])
        self.first_block = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(blocks_of(rows), out=self.first_block[1:])
        self.first_element = rows["token_offset"].astype(np.int64) // self.dtype.itemsize
        """Of the shard seen as one array of tokens."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> int:
        """The chunk that holds token `position` of the stream."""
        return int(self.first_token.searchsorted(position, side="right")) - 1

    def locate(self, positions: Integers) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Chunks of many positions, and where in the chunk each stands: [n], [n]."""
        chunks = self.first_token.searchsorted(positions, side="right") - 1
        return chunks, positions - self.first_token[chunks]

    def continues(self, chunk: int) -> bool:
        """Whether the chunk's first document began in an earlier chunk."""
        return bool(self.rows["flags"][chunk] & CONTINUES)

    def block_bounds(self, chunk: int, block: int) -> tuple[int, int]:
        """First token of a block inside its chunk, and the token behind its last."""
        first = block * BLOCK_TOKENS
        return first, min(first + BLOCK_TOKENS, int(self.num_tokens[chunk]))

    def place_of(self, chunk: int) -> tuple[str, int]:
        """Name of the shard that holds a chunk, and the chunk's number inside it."""
        shard = int(self.shard_of[chunk])
        return self.shards[shard]["name"], chunk - int(self.shard_of.searchsorted(shard))

    def block_is_whole(self, chunk: int, block: int, tokens: memoryview | bytes) -> bool:
        """Whether the bytes of a block have its checksum."""
        return bool(checksum(tokens) == self.checksums[int(self.first_block[chunk]) + block])

    def ends_are_whole(self, chunk: int, ends: memoryview | bytes) -> bool:
        """Whether the bytes of a chunk's document ends have their checksum."""
        return bool(checksum(ends) == self.rows["docs_checksum"][chunk])

    def damage(self, chunk: int, what: str, why: str) -> UserError:
        """The mistake to raise where a chunk is not as it was written."""
        name, within = self.place_of(chunk)
        return UserError(
            f"{self.shown}/{name}: chunk {within} is damaged ({what}: {why}); "
            f"restore the shard, or tokenize again; llm-dist data verify {self.shown} names all damage"
        )
