"""Every token of a step is named by its document, and the document by its file, from the recorded rule alone."""

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dist import tokenizer as tokenizers
from llm_dist.data import origin as origins
from llm_dist.data.index import open_shards
from llm_dist.data.loader import Loader
from llm_dist.data.mixture import Segment
from llm_dist.data.order import Order
from llm_dist.data.origin import Origin, read_origin
from llm_dist.data.parts import Parts
from llm_dist.data.reading import Reading, Source
from llm_dist.data.spill import document_hashes
from llm_dist.data.tokenize import tokenize
from llm_dist.data.trace import Trace, check_same_data, trace
from llm_dist.errors import UserError
from tests.unit.data.tiny_reading import packed
from tests.unit.data.tiny_shards import write_shards

WORDS = ["the", "quick", "brown", "fox", "jumps", "é", "狐", "<|endoftext|>", "dog"]
SEQUENCE_TOKENS, PER_STEP = 32, 4


def reading_of(
    folders: Mapping[str, Path], seed: int = 5, packing: str = "concatenate", weights: Mapping[str, int] | None = None
) -> Reading:
    sources = []
    for name, folder in folders.items():
        shards = open_shards(folder)
        packing_of = packed(shards, packing, SEQUENCE_TOKENS, seed, folder)
        sources.append(Source(name, shards, packing_of, Order(packing_of.num_windows, packing_of.cell_windows, seed)))
    shares = {name: Fraction(weight) for name, weight in (weights or dict.fromkeys(folders, 1)).items()}
    return Reading(sources, [Segment(0, shares)], PER_STEP, SEQUENCE_TOKENS)


def trace_all(folder: Path) -> list[Trace]:
    """Every step of an epoch, and its rows proved against what is read."""
    reading = reading_of({"train": folder})
    return list(traced(reading, range(1, 2 + reading.sources[0].order.num_windows // PER_STEP)))


def traced(reading: Reading, steps: range) -> Iterator[Trace]:
    decode = tokenizers.load(reading.sources[0].shards.tokenizer_folder).decode
    for step in steps:
        found = trace(reading, step, max_characters=1 << 20)
        assert (found.step, found.epochs) == (step, reading.epochs(step - 1))
        assert [document.row for document in found.documents] == sorted(document.row for document in found.documents)
        with Loader(reading, 1, 0, workers=0, first_step=step - 1) as loader:
            rows = loader.rows(step - 1)
        for row in range(PER_STEP):
            documents = [document for document in found.documents if document.row == row]
            borders = [document.row_tokens[0] for document in documents] + [int(rows.scored_tokens()[row])]
            assert borders[0] == 0
            assert [document.row_tokens for document in documents] == list(itertools.pairwise(borders))
            assert {document.source for document in documents} == {reading.sources[int(rows.sources[row])].name}
            for document in documents:
                assert document.text == decode(rows.inputs[row, slice(*document.row_tokens)].tolist())
        yield found


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
            assert document.file is not None
            assert document.number == 1
            assert document.text == stored_text(tokenizer, texts[document.file], document.document_tokens)
            if document.document_tokens[0] == 0 and document.row_tokens[1] < SEQUENCE_TOKENS:
                assert document.text == texts[document.file], "the whole document stands in the row"
            seen.setdefault(part, set()).add(document.file)
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
        assert found.notes == []
        for document in found.documents:
            assert document.file is not None
            assert document.number is not None
            text = texts[document.file.removesuffix(".txt")][document.number - 1]
            assert document.text == stored_text(tokenizer, text, document.document_tokens)


def test_a_text_cut_for_the_holdout_is_named_in_both_parts(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{number} the lazy dog" for number in range(100)))
    tokenize([str(tmp_path / "a.txt")], tiny_tokenizer, tmp_path / "out", holdout=0.2, workers=1)
    for part in ("train", "holdout"):
        documents = [document for found in trace_all(tmp_path / "out" / part) for document in found.documents]
        assert {(document.file, document.number) for document in documents} == {("a.txt", 1)}


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
            assert document.file is not None
            assert document.number is not None
            ids = stored[document.file, document.number]
            assert document.text == decode(ids[slice(*document.document_tokens)])
            chunks.add((document.shard, document.chunk))
    assert {f"shard-{number // 2:06d}.tar {number % 2}" for number in range(10)} == {f"{s} {c}" for s, c in chunks}


def test_without_the_record_everything_else_is_shown(tiny_tokenizer: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [[9] * 20, [10] * 30, [11] * 40], tiny_tokenizer)
    for found in trace_all(tmp_path / "train"):
        (note,) = found.notes
        assert note.startswith(f"{tmp_path}/train: ")
        assert note.endswith("tokenize again to have files named")
        assert {(document.file, document.number) for document in found.documents} == {(None, None)}
        assert all(": train: file unknown, tokens " in line for line in list(found.lines())[1:])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_each_row_of_a_mixture_is_named_by_its_source(tiny_tokenizer: Path, tmp_path: Path, packing: str) -> None:
    """Three sources of the same file names, one of which does not say where its documents came from."""
    texts = {name: [f"{name} {number} " + "fox " * number for number in range(1, 25)] for name in ("web", "code")}
    folders = {}
    for name, lines in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("\n".join(lines))
        tokenize(
            [f"{tmp_path}/{name}/x.txt"], tiny_tokenizer, tmp_path / f"{name}-out", holdout=0, split="line", workers=1
        )
        folders[name] = tmp_path / f"{name}-out" / "train"
    write_shards(tmp_path / "old", [[9] * length for length in (3, 70, 20)], tiny_tokenizer, chunk_tokens=32)
    reading = reading_of({**folders, "old": tmp_path / "old"}, packing=packing, weights={"web": 2, "code": 1, "old": 1})
    tokenizer = tokenizers.load(tiny_tokenizer)
    seen = set()
    for found in traced(reading, range(1, 60)):
        assert len(found.notes) == any(document.source == "old" for document in found.documents)
        for document in found.documents:
            seen.add((document.source, document.file))
            if document.source == "old":
                continue
            assert document.number is not None
            text = texts[document.source][document.number - 1]
            assert document.text == stored_text(tokenizer, text, document.document_tokens)
    assert seen == {("web", "x.txt"), ("code", "x.txt"), ("old", None)}


def test_other_data_than_the_run_read_is_not_traced(tiny_tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [[9] * 50], tiny_tokenizer)
    reading = reading_of({name: tmp_path / name for name in ("a", "b")})
    now = {f"data.{source.name}": source.shards.fingerprint for source in reading.sources}
    check_same_data(reading, now)
    check_same_data(reading, {"data.a": now["data.a"]})  # b has joined since
    with pytest.raises(UserError) as caught:
        check_same_data(reading, {**now, "data.b": "7" * 64})
    assert str(caught.value) == (
        f"source b ({tmp_path}/b) has the fingerprint {now['data.b'][:12]}, and the run read 777777777777; "
        "restore the folder to trace its steps"
    )


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
