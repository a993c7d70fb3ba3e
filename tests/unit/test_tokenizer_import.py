"""Tokenizers of others give the same ids here, and their tokens have the roles they are made for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dist.errors import UserError
from llm_dist.tokenizer import IMPORTED, KINDS, MASK, PAD, SEP, SEPARATOR, Tokenizer, load
from llm_dist.tokenizer_import import import_tokenizer
from llm_dist.tokenizer_training import train
from tests import hugging_face_tokenizers as makers

transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")

MAKERS = {"byte-level": makers.byte_level, "word-piece": makers.word_piece, "llama": makers.llama}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=MAKERS)
def folder(root: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of theirs; tests only read it."""
    folder = root / request.param
    if not folder.exists():
        MAKERS[request.param](folder)
    return folder


def imported(folder: Path) -> Tokenizer:
    out = folder.with_name(f"{folder.name}-ours")
    if not out.exists():
        import_tokenizer(folder, out)
    return load(out)


def test_ids_and_text_are_theirs(folder):
    ours, theirs = imported(folder), transformers.AutoTokenizer.from_pretrained(folder)
    again = transformers.AutoTokenizer.from_pretrained(ours.folder)
    assert ours.kind == IMPORTED not in KINDS

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.sampled_from(makers.TEXTS), st.text(max_size=40)))
    def check(text: str) -> None:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids == again(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()


def test_roles_are_theirs(root):
    ids = {}
    for name, make in MAKERS.items():
        if not (root / name).exists():
            make(root / name)
        ids[name] = imported(root / name)
    gpt2, bert, llama = ids.values()
    assert (gpt2.separator_id, gpt2.pad_id, gpt2.special_ids[SEP], gpt2.end_ids) == (0, 0, 0, {0})
    assert (bert.separator_id, bert.pad_id, bert.special_ids[SEP], bert.special_ids[MASK]) == (3, 0, 3, 4)
    assert (llama.separator_id, llama.special_ids[SEP], llama.end_ids) == (1, 2, {1, 2})
    assert MASK not in llama.special_ids
    assert bert.vocabulary_tokens == len(bert.vocabulary())


def test_equal_folders_have_equal_fingerprints_and_roles_count(folder, tmp_path):
    first, again = (import_tokenizer(folder, tmp_path / name) for name in ("first", "again"))
    assert first == again
    assert import_tokenizer(folder, tmp_path / "first") == first, "it is there already"
    description = json.loads((tmp_path / "first" / "llm_dist_tokenizer.json").read_text())
    description["special_ids"][PAD] += 5
    (tmp_path / "first" / "llm_dist_tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="changed after training"):
        load(tmp_path / "first")


def test_rows_of_the_checkpoint_count(folder, tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    for file in folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "config.json").write_text('{"vocab_size": 1000}')
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 2000]}')
    import_tokenizer(source, tmp_path / "out")
    tokenizer = load(tmp_path / "out")
    assert (tokenizer.vocabulary_tokens, tokenizer.id_to_token(999)) == (1000, None)
    assert 7 in tokenizer.end_ids and 2000 not in tokenizer.end_ids
    (source / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(
        UserError, match=r"does not fit the checkpoint: it has \d+ tokens, the checkpoint vocab_size=100"
    ):
        import_tokenizer(source, tmp_path / "other")


def test_a_vocabulary_without_tokenizer_json_is_converted(root, tmp_path, monkeypatch):
    if not (root / "word-piece").exists():
        makers.word_piece(root / "word-piece")
    words = transformers.AutoTokenizer.from_pretrained(root / "word-piece").get_vocab()
    source = tmp_path / "hf"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n", encoding="utf-8")
    (source / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(words)}))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    import_tokenizer(source, tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(source)
    for text in makers.TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.separator_id, ours.special_ids[MASK]) == (3, 4)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'llm_dist\[hf\]'"):
        import_tokenizer(source, tmp_path / "other")


def test_what_we_made_and_exported_stays_what_it_is(tmp_path):
    made = train(makers.TEXTS, "byte-bpe", 280, tmp_path / "made")
    (tmp_path / "made" / "config.json").write_text('{"vocab_size": 280}')
    again = import_tokenizer(tmp_path / "made", tmp_path / "again")
    assert (again.kind, again.fingerprint) == (made.kind, made.fingerprint)
    assert load(tmp_path / "again").special_ids[SEPARATOR] == 0


def test_mistakes_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        import_tokenizer(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        import_tokenizer(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists and is no tokenizer folder"):
        import_tokenizer(folder, tmp_path / "taken")
    train(makers.TEXTS, "byte-bpe", 280, tmp_path / "made")
    with pytest.raises(UserError, match="already holds another tokenizer"):
        import_tokenizer(folder, tmp_path / "made")
    assert not list(tmp_path.glob(".*partial"))
