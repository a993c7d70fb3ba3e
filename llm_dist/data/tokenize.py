"""The job that makes token shards: documents -> ids -> shuffled once -> `train` and `holdout` shard folders.

Two passes in bounded memory. The first encodes documents and spills them to buckets by hash; the second reads the
buckets in order of hash and writes the shards. The shards are a pure function of (inputs, tokenizer, seed, split,
holdout). Everything is made in a hidden folder and renamed into place, `train` last: the result is complete if and
only if `train` is there. Knows no sequence length, model or run.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm_dist.data.documents import OnBad, Split, Tally, read_files
from llm_dist.data.encoding import Encoder, encode_all, long_pieces
from llm_dist.data.folder import DTYPES
from llm_dist.data.inputs import InputFile, find_files
from llm_dist.data.origin import Part, SourceCounts, origin_record
from llm_dist.data.output import Hashing, Output, unpacked_bytes
from llm_dist.data.parts import ALL_TRAIN, Bytes, Parts, tail
from llm_dist.data.shards import ShardWriter, dtype_name
from llm_dist.data.spill import Documents, Spill, document_hashes, num_buckets
from llm_dist.errors import UserError
from llm_dist.tokenizer import FILES, Tokenizer, load
from llm_dist.tokenizer_fast import FastTokenizer, load_fast, proved

BYTES_PER_WORKER = 8 << 20
"""Input below which starting one more worker costs more than it saves."""
FAST_BYTES = 16 << 20
"""Input below which proving that tiktoken may encode costs about what it saves: half a second."""
_SAMPLE_TEXTS, _SAMPLE_CHARACTERS = 256, 1 << 19


@dataclass(frozen=True)
class Progress:
    """How far the job is."""

    stage: str
    """reading, encoding or writing."""
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class PartReport:
    """One shard folder that was made."""

    folder: str
    num_documents: int
    num_tokens: int
    """Separators count."""
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class TokenizeReport:
    """What was made of what; `dataclasses.asdict` makes it JSON."""

    train: PartReport
    holdout: PartReport | None
    holdout_how: str
    tokenizer: str
    """The tokenizer's fingerprint."""
    num_files: int
    num_skipped_files: int
    num_empty_documents: int
    num_bad_records: int
    first_bad: str | None
    encoder: str | None
    """What encoded, tiktoken or tokenizers, and why not the faster one; None when nothing had to be done."""
    seconds: float
    tokens_per_second: float
    """Over the whole job; 0 when nothing had to be done."""
    already_made: bool
    """The same inputs had been tokenized there before; nothing was written."""


@dataclass(frozen=True)
class _Job:
    files: Sequence[InputFile]
    hashing: Hashing
    tokenizer: Tokenizer
    output: Output
    split: Split
    on_bad: OnBad
    seed: int
    holdout: float
    workers: int
    progress: Callable[[Progress], None]

    def made_from(self) -> dict[str, Any]:
        """What decides the shards, known when the inputs are hashed."""
        chosen = {"seed": self.seed, "split": self.split, "holdout": self.holdout}
        return {"inputs": self.hashing.result(), "tokenizer": self.tokenizer.fingerprint, **chosen}

    def texts(self, tally: Tally) -> Iterator[str]:
        for document in read_files(self.files, split=self.split, on_bad=self.on_bad, tally=tally):
            yield document.text


def tokenize(
    inputs: Sequence[str],
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    holdout: float = 0.01,
    split: Split = "file",
    on_bad: OnBad = "stop",
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TokenizeReport:
    """Make `out/train` and, unless `holdout` is 0, `out/holdout` of the documents in `inputs`.

    `holdout` is a share of the bytes. An unfinished `out` is made anew, a finished one of the same inputs left alone.

    Raises:
        UserError: bad input, too little text to hold out a part, a full disk, or an `out` that holds something else.
    """
    began = time.perf_counter()
    if not 0 <= holdout < 1:
        raise UserError(f"--holdout {holdout}: must be a share of the text, at least 0 and below 1")
    tell = progress or (lambda _: None)
    tokenizer = load(tokenizer_folder)
    files, num_skipped = find_files(inputs)
    try:
        with Output(Path(out)) as output:
            files = [output.spooled(file) if file.path is None else file for file in files]
            tell(Progress("reading"))
            count = num_workers(workers, sum(map(unpacked_bytes, files)))
            with Hashing(files) as hashing:
                job = _Job(files, hashing, tokenizer, output, split, on_bad, seed, holdout, count, tell)
                is_new = output.is_empty() or not output.is_made_from(job.made_from())
                encoder = _make(job, Tally(num_skipped_files=num_skipped)) if is_new else None
            return _report(output, time.perf_counter() - began, encoder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{out}: the disk is full; nothing was kept; free space or name another --out") from None


def _make(job: _Job, tally: Tally) -> str:
    """Make and publish both parts; say what encoded them."""
    input_bytes = sum(map(unpacked_bytes, job.files))
    job, encoder = _fastest(job, input_bytes)
    dtype = DTYPES[dtype_name(job.tokenizer.vocabulary_tokens)]
    spill = Spill(job.output.work / "spill", num_buckets(input_bytes), dtype)
    with ExitStack() as stack:
        stack.callback(spill.close)
        num_bytes = _encode(job, tally, spill)
        parts = _parts(job, num_bytes)
        _write(job, spill, parts, tally)
    job.output.publish()
    return encoder


def _fastest(job: _Job, input_bytes: int) -> tuple[_Job, str]:
    """The job with the fastest tokenizer that is proved to give the same ids, and what to call that."""
    if input_bytes < FAST_BYTES or job.tokenizer.kind != "byte-bpe":
        return job, "tokenizers"
    found = proved(job.tokenizer, _sample(job))
    return (job, f"tokenizers ({found})") if isinstance(found, str) else (replace(job, tokenizer=found), "tiktoken")


def _sample(job: _Job) -> list[str]:
    """The first texts, as encoding would get them."""
    sample: list[str] = []
    for text in job.texts(Tally()):
        sample += islice(long_pieces(job.tokenizer.kind, text), _SAMPLE_TEXTS)
        if len(sample) >= _SAMPLE_TEXTS or sum(map(len, sample)) >= _SAMPLE_CHARACTERS:
            break
    return sample


def _encode(job: _Job, tally: Tally, spill: Spill) -> Bytes:
    """First pass: every document to its bucket."""
    num_bytes, num_documents, num_tokens = Bytes(), 0, 0
    worker_load = load_fast if isinstance(job.tokenizer, FastTokenizer) else load
    for batch in encode_all(job.texts(tally), job.tokenizer, worker_load, job.workers):
        numbers = np.arange(num_documents, num_documents + len(batch.num_tokens))
        hashes = document_hashes(job.seed, num_documents, len(numbers))
        spill.write(Documents(numbers, hashes, batch.num_tokens, batch.num_bytes, batch.ids))
        num_bytes.add(hashes, batch.num_bytes)
        num_documents += len(numbers)
        num_tokens += len(batch.ids)
        job.progress(Progress("encoding", num_documents, num_tokens, num_bytes.total))
    return num_bytes


def _parts(job: _Job, num_bytes: Bytes) -> Parts:
    if not job.holdout:
        return ALL_TRAIN
    if whole := num_bytes.whole_documents(job.holdout):
        return whole
    again = read_files(job.files, split=job.split, on_bad=job.on_bad, tally=Tally())
    return tail(again, num_bytes.total, job.holdout)


def _write(job: _Job, spill: Spill, parts: Parts, tally: Tally) -> None:
    """Second pass: every document to its part, in order of hash."""
    vocabulary, fingerprint = job.tokenizer.vocabulary_tokens, job.tokenizer.fingerprint
    done = Progress("writing")
    with ExitStack() as stack:
        names: tuple[Part, ...] = ("train", "holdout") if job.holdout else ("train",)
        writers = [stack.enter_context(ShardWriter(job.output.work / name, vocabulary, fingerprint)) for name in names]
        sources = [SourceCounts(tally.documents_per_file) for _ in names]
        for block in spill.blocks():
            for part, documents in _dealt(job, block, parts):
                writers[part].add_many(documents.ids, documents.num_tokens, documents.num_bytes)
                sources[part].add_many(documents.numbers, documents.num_tokens, documents.num_bytes)
            done = replace(
                done,
                num_documents=done.num_documents + len(block.numbers),
                num_tokens=done.num_tokens + len(block.ids),
                num_bytes=done.num_bytes + int(block.num_bytes.sum()),
            )
            job.progress(done)
        outcome = {
            "holdout_how": parts.how,
            "num_files": tally.num_files,
            "num_skipped_files": tally.num_skipped_files,
            "num_empty_documents": tally.num_empty_documents,
            "num_bad_records": tally.num_bad_records,
            "first_bad": tally.first_bad,
        }
        made_from = {**job.made_from(), "outcome": outcome}
        tokenizer_files = [job.tokenizer.folder / name for name in FILES]
        for name, writer, source in zip(names, writers, sources, strict=True):
            record = origin_record(name, tally.documents_per_file, parts)
            writer.close(tokenizer_files, {**made_from, "documents": record, "sources": source.record()})


def _dealt(job: _Job, block: Documents, parts: Parts) -> Iterator[tuple[int, Documents]]:
    """The documents of a block by part, 0 or 1, those of a part in the block's order."""
    insides = parts.masks(block.numbers, block.hashes)
    if parts.cut is None or parts.tail_from not in block.numbers:
        yield from ((part, block.take(inside)) for part, inside in enumerate(insides) if inside.any())
        return
    places = np.arange(len(block.numbers))
    cut = int(np.flatnonzero(block.numbers == parts.tail_from)[0])
    for part, (inside, text) in enumerate(zip(insides, parts.cut, strict=True)):
        piece = Encoder(job.tokenizer).encode([text])
        yield part, block.take(places[inside & (places < cut)])
        yield part, Documents(block.numbers[[cut]], block.hashes[[cut]], piece.num_tokens, piece.num_bytes, piece.ids)
        yield part, block.take(places[inside & (places > cut)])


def _report(output: Output, seconds: float, encoder: str | None) -> TokenizeReport:
    parts = {part: output.dataset(part) for part in ("train", "holdout")}
    reports = {
        part: PartReport(
            str(output.folder / part),
            *(dataset[key] for key in ("num_documents", "num_tokens", "num_bytes", "fingerprint")),
        )
        for part, dataset in parts.items()
        if dataset is not None
    }
    train = parts["train"]
    assert train is not None, "a finished output has its train part"
    num_tokens = sum(report.num_tokens for report in reports.values())
    return TokenizeReport(
        reports["train"],
        reports.get("holdout"),
        tokenizer=train["tokenizer"],
        encoder=encoder,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds if encoder else 0.0,
        already_made=encoder is None,
        **train["made_from"]["outcome"],
    )


def num_workers(wanted: int | None, input_bytes: int) -> int:
    """Workers: as asked, else the cores this process may use, and no more than the input keeps busy."""
    if wanted is not None and wanted < 1:
        raise UserError(f"--workers {wanted}: must be at least 1; leave it out to use every core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, min(cores, input_bytes // BYTES_PER_WORKER))
