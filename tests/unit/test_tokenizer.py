"""Tokenizers: lossless, the same in Hugging Face, reproducible, and clear about what cannot be."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.errors import UserError
from llm_dist.tokenizer import FILES, KINDS, LOSSLESS_KINDS, SPECIAL_TOKENS, Tokenizer, load
from llm_dist.tokenizer_training import draw_sample, train
from llm_dist.tokenizer_vocabulary import train_sentencepiece

VOCABULARY_TOKENS = 700
TEXTS = [topics["lambda"], topics["numbers"], topics["string-methods"][:40_000]]
NASTY_TEXTS = [
    "nul \0 tab \t mark \u2581 shade \u2585 unk <unk> <|unk|> byte <0x0A><0x0A><0x0A>",
    "<|endoftext|><|endoftext|><|pad|> <|pad|>\r\n\r\nnaïve naïve 字字 é é 👩‍👩‍👧",
]
TRAPS = [
    "",
    " ",
    "  leading and trailing  ",
    "\u2581",
    "a\u2581b \u2581 c",
    "\u2585",
    "<|endoftext|>",
    "before<|mask|>after<|pad|><|unk|>",
    "<<|im_start|>user",
    "<0x0A>",
    "<0x0A><0xE4><0x",
    "<<0x00>>",
    "<unk> <s> </s> [UNK] ##ing",
    "\0",
    "a\0\0b",
    "\r",
    "line\r\nline\r\n\r\n",
    "\n\n\n  indented\n\ttab\t\n",
    "\ufeffbyte order mark",
    "e\u0301 a\u0300\u0316 \u0301",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "\U0001d518\U0001d52b \U0010ffff \ue000 \ufffe",
    "ﬁ ½ Ⅷ \uff11\uff12",
    "\u00a0\u2003\u3000\u200b\u2028\u0085",
    "नमस्ते العربية 漢字かな交じり文",
    "1234567890 3.14e-10",
    "a" * 3000,
    "字" * 3000,
    " " * 3000,
    "\n" * 3000,
    "don't DON'T 'S \u017f",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train(TEXTS + NASTY_TEXTS, kind, VOCABULARY_TOKENS, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load(folder) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def tokenizer(tokenizers: dict[str, Tokenizer], request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizers[request.param]


@pytest.mark.parametrize("text", TRAPS, ids=ascii)
@pytest.mark.parametrize("kind", LOSSLESS_KINDS)
def test_traps_survive_and_make_no_special_token(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text
    assert all(len(SPECIAL_TOKENS) <= id_ < VOCABULARY_TOKENS for id_ in ids)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LOOKS_SPECIAL = [*SPECIAL_TOKENS, "<0x0A>", "<0xFF>", "<", "|>", " ", "  ", "\n", "\r\n", "\u2581", "\0", "the", "字"]
LOOKALIKES = st.lists(st.sampled_from(LOOKS_SPECIAL) | ANY_TEXT).map("".join)


@given(text=ANY_TEXT | LOOKALIKES)
@settings(max_examples=300, deadline=None)
def test_any_text_survives(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for kind in LOSSLESS_KINDS:
        ids = tokenizers[kind].encode(text)
        assert tokenizers[kind].decode(ids) == text, kind
        assert all(id_ >= len(SPECIAL_TOKENS) for id_ in ids), kind


@given(ids=st.lists(st.integers(0, VOCABULARY_TOKENS + 100)))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode(tokenizers: dict[str, Tokenizer], ids: list[int]) -> None:
    for tokenizer in tokenizers.values():
        text = tokenizer.decode(ids)
        assert text.encode("utf-8").decode("utf-8") == text


@pytest.mark.parametrize("kind", LOSSLESS_KINDS)
def test_broken_bytes_become_the_replacement_character(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    ids = tokenizers[kind].encode("\U0001f9ff")
    assert len(ids) == 4
    assert set(tokenizers[kind].decode(ids[:-1])) == {"\ufffd"}


def test_special_tokens_come_first_and_vanish_in_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {token: id_ for id_, token in enumerate(SPECIAL_TOKENS)}
    assert [tokenizer.id_to_token(id_) for id_ in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert (tokenizer.separator_id, tokenizer.pad_id, tokenizer.vocabulary_tokens) == (0, 1, VOCABULARY_TOKENS)
    assert tokenizer.id_to_token(VOCABULARY_TOKENS) is None
    ids = tokenizer.encode("the lambda")
    assert tokenizer.decode([0, *ids, 5, 1]) == tokenizer.decode(ids)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TRAPS) == [tokenizer.encode(text) for text in TRAPS]


def test_words_are_learnt(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("the string")) <= 4


def test_wordpiece_lowers_only_when_asked(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    train(TEXTS, "wordpiece", VOCABULARY_TOKENS, tmp_path / "lower", lowercase=True)
    lower, cased = load(tmp_path / "lower"), tokenizers["wordpiece"]
    assert lower.encode("The É") == lower.encode("the e")
    assert cased.encode("The") != cased.encode("the")
    assert cased.encode("\U0001f9ff") == [cased.special_ids["<|unk|>"]]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_are_those_of_sentencepiece(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    import sentencepiece

    spans = draw_sample(TEXTS + NASTY_TEXTS, 10**9).spans
    oracle = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(kind, spans, VOCABULARY_TOKENS))
    # Unigram takes equally likely segmentations in either order; BPE has no such freedom.
    comparable = sorted if kind == "unigram" else list
    for line in "".join([*TEXTS, topics["dynamic-features"]]).splitlines(keepends=True):
        expected = [oracle.id_to_piece(id_).replace("\u2581", " ") for id_ in oracle.encode(line)]
        found = [tokenizers[kind].id_to_token(id_) for id_ in tokenizers[kind].encode(line)]
        assert comparable(found) == comparable(expected)


def test_hugging_face_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    exported.save_pretrained(tmp_path)
    texts = [*TRAPS, *TEXTS]
    for theirs in (exported, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
        assert [theirs(text)["input_ids"] for text in texts] == tokenizer.encode_batch(texts)
        assert theirs(["a", "b c"])["input_ids"] == tokenizer.encode_batch(["a", "b c"])
        for text in texts:
            ids = tokenizer.encode(text)
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
        assert (*named, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (0, 0, 1, 2, 3, 4, 5)
        assert sorted(theirs.all_special_ids) == list(range(8))
        assert len(theirs) == tokenizer.vocabulary_tokens
        assert theirs.model_max_length > 10**9


@pytest.mark.parametrize("kind", KINDS)
def test_same_text_gives_the_same_bytes_in_another_process(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from tests.unit.test_tokenizer import *\n"
        f"train(TEXTS + NASTY_TEXTS, {kind!r}, VOCABULARY_TOKENS, pathlib.Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / kind)], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
    for name in FILES:
        assert (tmp_path / kind / name).read_bytes() == (folders[kind] / name).read_bytes()


def test_report_is_stored_and_plausible(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        report = train(TEXTS + NASTY_TEXTS, kind, VOCABULARY_TOKENS, folders[kind])
        stored = json.loads((folders[kind] / "llm_dist_tokenizer.json").read_text())
        assert stored == {
            "version": 1,
            "kind": kind,
            "fingerprint": report.fingerprint,
            "report": dataclasses.asdict(report),
        }
        assert report.sample_bytes == sum(len(text.encode()) for text in TEXTS + NASTY_TEXTS)
        assert report.sample_documents == len(TEXTS + NASTY_TEXTS)
        assert 1.5 < report.bytes_per_token < 6
        assert 1 < report.fertility < 6
        assert 0 < report.fallback_share < 0.02
    with pytest.raises(UserError, match="already holds another tokenizer; choose another folder"):
        train(TEXTS, "bpe", VOCABULARY_TOKENS, folders["bpe"])
    assert [path.name for path in folders["bpe"].parent.glob(".*")] == []


def test_sample_is_bounded_uniform_and_in_reading_order() -> None:
    texts = [f"{number:05d} " * 20 for number in range(2000)]
    sample = draw_sample(iter(texts), 24_000, seed=3)
    assert sample.num_bytes == sum(len(span) for span in sample.spans) <= 24_000
    assert len(sample.spans) == sample.num_documents == 200
    assert sample.spans == sorted(sample.spans)
    assert 700 < sum(int(span[:5]) for span in sample.spans) / 200 < 1300
    assert draw_sample(texts, 24_000, seed=3) == sample
    assert draw_sample(texts, 24_000, seed=4) != sample
    assert draw_sample(texts, 10**9).spans == texts


def test_long_document_is_sampled_in_spans_without_loss() -> None:
    text = ("line of some length\n" * 5000) + "x" * 200_000
    sample = draw_sample([text], 10**9)
    assert "".join(sample.spans) == text
    assert sample.num_documents == 1
    assert max(map(len, sample.spans)) <= 1 << 16


def test_one_document_larger_than_the_sample_still_trains(tmp_path: Path) -> None:
    report = train(["word " * 10_000], "bpe", 270, tmp_path / "out", sample_bytes=10)
    assert report.sample_documents == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_empty_corpus(kind: str, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no text"):
        train(texts, kind, 500, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_bounds_named_are_the_true_ones(kind: str, tmp_path: Path) -> None:
    for wanted, word in ((9, "at least"), (300 if kind != "byte-bpe" else 263, "at least"), (10**6, "at most")):
        if kind == "wordpiece" and wanted == 300:
            continue
        with pytest.raises(UserError, match=word) as caught:
            train(TEXTS, kind, wanted, tmp_path / "out")
        assert "\n" not in str(caught.value)
        bound = int(str(caught.value).split(word)[1].split(";")[0])
        if wanted == 9 and kind in ("bpe", "unigram"):
            continue
        assert train(TEXTS, kind, bound, tmp_path / f"{wanted}").vocabulary_tokens == bound
        beyond = bound - 1 if word == "at least" else bound + 1
        with pytest.raises(UserError, match=f"{word} {bound}"):
            train(TEXTS, kind, beyond, tmp_path / "out")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'bpe2' is unknown; choose one of bpe, unigram, byte-bpe, wordpiece"):
        train(TEXTS, "bpe2", 500, tmp_path / "out")
    with pytest.raises(UserError, match="only wordpiece may"):
        train(TEXTS, "bpe", 500, tmp_path / "out", lowercase=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"taken exists and is no tokenizer folder; choose another"):
        train(TEXTS, "bpe", 500, tmp_path / "taken")
    (tmp_path / "empty").mkdir()
    train(TEXTS, "byte-bpe", 500, tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == sorted(FILES)


def test_failed_publishing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        train(TEXTS, "byte-bpe", 500, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    with pytest.raises(UserError, match=r"tokenizer is not a tokenizer folder.*no tokenizer\.json"):
        load(folder)
    train(TEXTS, "byte-bpe", 500, folder)
    definition = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(definition), indent=2))
    load(folder)
    (folder / "tokenizer.json").write_text(definition.replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(UserError, match="changed after training"):
        load(folder)
    (folder / "tokenizer.json").write_text(definition[:100])
    with pytest.raises(UserError, match=r"tokenizer\.json is not JSON"):
        load(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer_config\.json"):
        load(folder)


def test_loading_needs_neither_torch_nor_transformers(folders: dict[str, Path]) -> None:
    program = (
        "import sys; import llm_dist.tokenizer as t; assert 'tokenizers' not in sys.modules\n"
        f"t.load({str(folders['bpe'])!r}).encode('a')\n"
        "print([name for name in ('torch', 'transformers', 'sentencepiece') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.data
def test_real_corpora_survive(tmp_path: Path) -> None:
    root = Path(os.environ.get("LLM_DIST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"LLM_DIST_DATA: no corpora at {root}")
    chinese = gzip.decompress((root / "zh_classics" / "hongloumeng.txt.gz").read_bytes()).decode()[:60_000]
    english = (root / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:60_000]
    for kind in LOSSLESS_KINDS:
        report = train([english, chinese], kind, 3500, tmp_path / kind)
        tokenizer = load(tmp_path / kind)
        for text in (english, chinese):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert report.bytes_per_token > 2
        assert report.fallback_share < 0.2
