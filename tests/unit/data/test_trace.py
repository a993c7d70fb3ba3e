"""Every token of a step is named by its document, and the document by its file, from the recorded rule alone."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import tokenizer as tokenizers
from llm_dist.data import origin as origins
from llm_dist.data.index import open_shards
from llm_dist.data.order import Order, sequence_ids
from llm_dist.data.origin import Origin, read_origin
from llm_dist.data.parts import Parts
from llm_dist.data.spill import document_hashes
from llm_dist.data.tokenize import tokenize
from llm_dist.data.trace import Trace, trace
from tests.unit.data.tiny_shards import write_shards

WORDS = ["the", "quick", "brown", "fox", "jumps", "é", "狐", "<|endoftext|>", "dog"]
SEQUENCE_TOKENS, PER_STEP = 32, 4


def trace_all(folder: Path, seed: int = 5) -> list[Trace]:
    """Every step of an epoch, and its rows proved against what the order reads."""
    shards = open_shards(folder)
    order = Order(shards.num_tokens, SEQUENCE_TOKENS, seed)
    decode = tokenizers.load(shards.tokenizer_folder).decode
    traces = []
    for step in range(1, 2 + order.sequences_per_epoch // PER_STEP):
        found = trace(shards, order, step, PER_STEP, max_characters=1 << 20)
        _, starts = order.starts(sequence_ids(step - 1, PER_STEP))
        for row, start in enumerate(starts.tolist()):
            documents = [document for document in found.documents if document.row == row]
            borders = [document.row_tokens[0] for document in documents] + [SEQUENCE_TOKENS + 1]
            assert [document.row_tokens for document in documents] == list(itertools.pairwise(borders))
            for document in documents:
                first, end = document.row_tokens
                assert document.text == decode(shards.tokens(start + first, end - first).tolist())
        traces.append(found)
    return traces


def stored_text(tokenizer: tokenizers.Tokenizer, text: str, tokens: tuple[int, int]) -> str:
    return tokenizer.decode([tokenizer.separator_id, *tokenizer.encode(text)][slice(*tokens)])


@pytest.mark.parametrize("holdout", [0, 0.2])
def test_many_small_files_are_named_by_their_text(tiny_tokenizer: Path, tmp_path: Path, holdout: float) -> None:
    draw = random.Random(1)
    texts = {f"corpus/{number:03d}.txt": " ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for number in range(200)}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "corpus" / "000.txt").write_text(" \n")
    tokenize([str(tmp_path / "corpus")], tiny_tokenizer, tmp_path / "out", holdout=holdout, workers=1)
    tokenizer = tokenizers.load(tiny_tokenizer)
    seen: dict[str, set[str]] = {}
    for part in ("train", "holdout") if holdout else ("train",):
        for document in (document for found in trace_all(tmp_path / "out" / part) for document in found.documents):
            assert document.source is not None
            assert document.number == 1
            assert document.text == stored_text(tokenizer, texts[document.source], document.document_tokens)
            if document.document_tokens[0] == 0 and document.row_tokens[1] <= SEQUENCE_TOKENS:
                assert document.text == texts[document.source], "the whole document stands in the row"
            seen.setdefault(part, set()).add(document.source)
    assert set.union(*seen.values()) == texts.keys() - {"corpus/000.txt"}
    if holdout:
        assert not seen["train"] & seen["holdout"]


def test_a_document_of_many_is_named_by_file_and_number(tiny_tokenizer: Path, tmp_path: Path) -> None:
    texts = {name: [f"{name} {number} " + "fox " * number for number in range(1, 30)] for name in ("a", "b", "c")}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    inputs = [str(tmp_path / f"{name}.txt") for name in texts]
    tokenize(inputs, tiny_tokenizer, tmp_path / "out", holdout=0.02, split="line", seed=9, workers=1)
    tokenizer = tokenizers.load(tiny_tokenizer)
    for found in trace_all(tmp_path / "out" / "train"):
        assert found.note is None
        for document in found.documents:
            assert document.source is not None
            assert document.number is not None
            text = texts[document.source.removesuffix(".txt")][document.number - 1]
            assert document.text == stored_text(tokenizer, text, document.document_tokens)


def test_a_text_cut_for_the_holdout_is_named_in_both_parts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{number} the lazy dog" for number in range(100)))
    tokenize([str(tmp_path / "a.txt")], tiny_tokenizer, tmp_path / "out", holdout=0.2, workers=1)
    for part in ("train", "holdout"):
        documents = [document for found in trace_all(tmp_path / "out" / part) for document in found.documents]
        assert {(document.source, document.number) for document in documents} == {("a.txt", 1)}


def test_a_document_over_many_chunks_is_followed(tiny_tokenizer: Path, tmp_path: Path) -> None:
    stream = [[9] * 5, list(range(8, 250)), [10] * 3]
    write_shards(tmp_path / "train", stream, tiny_tokenizer, chunk_tokens=32)
    path = tmp_path / "train" / "dataset.json"
    documents = {"part": "train", "per_input": [1, 2], "held_bins": 0, "tail_from": None, "is_cut": False}
    made_from = {"inputs": [{"name": "a"}, {"name": "b"}], "seed": 0, "documents": documents}
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_from": made_from}))
    decode = tokenizers.load(tiny_tokenizer).decode
    # Document `number` of the input stands where its hash comes in order.
    numbers = np.argsort(document_hashes(0, 0, 3)).tolist()
    stored = {[("a", 1), ("b", 1), ("b", 2)][number]: [0, *stream[place]] for place, number in enumerate(numbers)}
    chunks = set()
    for found in trace_all(tmp_path / "train"):
        for document in found.documents:
            assert document.source is not None
            assert document.number is not None
            ids = stored[document.source, document.number]
            assert document.text == decode(ids[slice(*document.document_tokens)])
            chunks.add((document.shard, document.chunk))
    assert {f"shard-{number // 2:06d}.tar {number % 2}" for number in range(10)} == {f"{s} {c}" for s, c in chunks}


def test_without_the_record_everything_else_is_shown(tiny_tokenizer: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [[9] * 20, [10] * 30, [11] * 40], tiny_tokenizer)
    for found in trace_all(tmp_path / "train"):
        assert found.note is not None
        assert found.note.endswith("tokenize again to have sources named")
        assert {document.source for document in found.documents} == {None}
        assert all(": source unknown, tokens " in line for line in list(found.lines())[1:])


def test_a_record_that_fits_other_shards_is_not_believed(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"the fox {number}" for number in range(40)))
    tokenize([str(tmp_path / "a.txt")], tiny_tokenizer, tmp_path / "out", split="line", holdout=0, workers=1)
    dataset = json.loads((tmp_path / "out" / "train" / "dataset.json").read_text())
    assert read_origin(dataset) is not None
    dataset["made_from"]["documents"]["per_input"] = [39]
    assert read_origin(dataset) is None


@given(
    total=st.integers(1, 300),
    seed=st.integers(0, 3),
    held_bins=st.sampled_from([0, 1 << 13, 1 << 15]),
    block=st.sampled_from([7, 64, 1 << 20]),
)
def test_numbers_are_those_of_the_sorted_hashes(total: int, seed: int, held_bins: int, block: int) -> None:
    parts = Parts("", held_bins=held_bins)
    words = document_hashes(seed, 0, total).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origins, "_BLOCK_DOCUMENTS", block)
        for part in ("train", "holdout"):
            chosen = [number for number in range(total) if parts.holds(number, words[number]) == (part == "holdout")]
            expected = sorted(chosen, key=words.__getitem__)
            found = Origin(["a"], np.array([total]), seed, part, parts)  # type: ignore[arg-type]
            assert found.num_documents() == len(expected)
            places = np.random.default_rng(0).permutation(len(expected))[:50]
            assert found.numbers(places).tolist() == [expected[place] for place in places.tolist()]
