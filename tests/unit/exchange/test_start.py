"""The first weights of a run from a folder of theirs: what fits, what is new, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_dist import config, trained
from llm_dist import tokenizer as tokenizers
from llm_dist.config import LANGUAGE, Heads
from llm_dist.errors import UserError
from llm_dist.exchange.load import open_folder
from llm_dist.exchange.prepare import prepare
from llm_dist.exchange.start import fill_from_hugging_face
from llm_dist.model.size import parameter_shapes
from llm_dist.tokenizer import Tokenizer
from llm_dist.tokenizer_import import import_tokenizer
from tests import hugging_face_tokenizers as makers
from tests.unit.exchange.folders import saved, transformers

Roots = tuple[Path, Tokenizer]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Roots:
    """A folder of theirs with a tokenizer, and that tokenizer as ours."""
    return made(tmp_path_factory.mktemp("bert"), "bert", makers.word_piece)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return made(tmp_path_factory.mktemp("llama"), "llama", makers.llama)


def made(root: Path, case: str, maker: Any, **keys: Any) -> Roots:
    maker(root / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    saved(case, root / "hf", vocab_size=len(tokenizer), **keys)
    maker(root / "hf")
    import_tokenizer(root / "hf", root / "ours")
    return root / "hf", tokenizers.load(root / "ours")


def at_random(name: str, shape: Any) -> torch.Tensor:
    return torch.full(tuple(shape), 7.0)


def filled(roots: Roots, heads: Heads = LANGUAGE, **changes: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every parameter of a run on the folder, and what was reported."""
    folder, tokenizer = roots
    model = open_folder(folder).model.model_copy(update=changes)
    said: list[str] = []
    fill = fill_from_hugging_face(folder, model, heads, tokenizer, at_random, said.append)
    shapes = parameter_shapes(model, tokenizer.vocabulary_tokens, heads)
    values = {name: fill(name, shape) for name, shape in shapes.items()}
    assert {name: tuple(value.shape) for name, value in values.items()} == shapes
    return values, said


def test_everything_is_taken_over(bert):
    values, said = filled(bert, vocabulary_multiple=16)
    assert not said
    assert not any((value == 7.0).all() for value in values.values())
    rows = bert[1].vocabulary_tokens
    assert values["embedding.weight"].size(0) % 16 == 0
    assert torch.equal(values["embedding.weight"][:rows], open_folder(bert[0]).parameter("embedding.weight")[:rows])
    assert not values["embedding.weight"][rows:].any()


def test_heads_that_are_not_there_start_at_random(bert):
    values, said = filled(bert, Heads(language=False, classes=3))
    new = {name for name, value in values.items() if (value == 7.0).all()}
    assert new == {f"{name}.{kind}" for name in ("pooler.dense", "class_head.output") for kind in ("weight", "bias")}
    assert said == [f"init.from={bert[0]} has no weights for {', '.join(sorted(new))}: they start at random"]


def test_a_head_for_other_classes_is_another_head(tmp_path):
    roots = made(tmp_path, "bert-classes", makers.word_piece)
    assert filled(roots, Heads(language=False, classes=3))[1] == []
    _, said = filled(roots, Heads(language=False, classes=4))
    assert "has no weights for class_head.output.bias, class_head.output.weight:" in said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_ff": 64}, "model.d_ff=64 here, 48 there"),
        ({"layers": 3, "d_ff": 64}, "model.layers=3 here, 2 there"),
        ({"norm_eps": 0.1}, "model.norm_eps=0.1 here, 1e-12 there"),
        ({"max_sequence_tokens": 32}, "model.max_sequence_tokens=32 here, 64 there"),
    ],
)
def test_the_first_key_that_differs_is_named(changes, said, bert):
    with pytest.raises(UserError, match=said):
        filled(bert, **changes)


def test_the_reach_of_a_decoder_may_change_and_is_said(llama):
    _, said = filled(llama, rope_theta=500.0, max_sequence_tokens=4096, dropout=0.1)
    assert said == [f"init.from={llama[0]} was trained with model.rope_theta=10000.0; this run has 500.0"]


def test_a_tokenizer_that_does_not_fit_is_named(bert, llama):
    with pytest.raises(UserError, match=r"does not fit the checkpoint: the data's has \d+ tokens, the checkpoint \d+"):
        filled((bert[0], llama[1]))


def test_a_tokenizer_with_other_ids_is_named(bert, tmp_path):
    changed = tmp_path / "hf"
    changed.mkdir()
    for file in bert[0].iterdir():
        text = file.read_bytes()
        (changed / file.name).write_bytes(text.replace(b'"##', b'"#"') if file.name == "other" else text)
    definition = (changed / "tokenizer.json").read_text(encoding="utf-8")
    (changed / "tokenizer.json").write_text(definition.replace('"the"', '"teh"'), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"does not fit the checkpoint: token 'teh' has id None in the data's, \d+ ther"
    ):
        filled((changed, bert[1]))


def test_import_writes_a_run_file_of_the_same_model(bert, llama, tmp_path):
    for number, (folder, tokenizer) in enumerate((bert, llama)):
        out = tmp_path / str(number)
        prepared = prepare(folder, out)
        run = config.load(out / "run.toml")
        assert run.model == open_folder(folder).model
        assert run.init.source == str(folder)
        assert prepared.tokenizer_fingerprint == tokenizers.load(out / "tokenizer").fingerprint == tokenizer.fingerprint
        with pytest.raises(UserError, match=r"run\.toml is there already"):
            prepare(folder, out)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "bert-pairs", "bert-classes", "bert-tags", "roberta", "modernbert"])
def test_a_folder_stands_for_a_checkpoint(case, tmp_path):
    maker = makers.llama if case == "llama" else makers.word_piece
    folder, tokenizer = made(tmp_path, case, maker, **({"pad_token_id": 0} if case == "roberta" else {}))
    found = trained.find(folder)
    ids = torch.randint(5, tokenizer.vocabulary_tokens, (1, 12))
    model = found.model()
    assert torch.isfinite(model(ids)).all()
    assert (found.step, found.tokenizer.fingerprint) == (0, tokenizer.fingerprint)
    written = trained.export_to(found, tmp_path / "again", "fp32")
    again = getattr(transformers, written.hugging_face_class).from_pretrained(tmp_path / "again")
    before = type(again).from_pretrained(folder)
    name = "prediction_logits" if case == "bert-pairs" else "logits"
    torch.testing.assert_close(again(ids)[name], before(ids)[name])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again")("the fox").input_ids
    assert trained.find(tmp_path / "again").tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="leave --step and --best out"):
        trained.find(folder, best=True)


def test_a_body_without_a_head_is_no_checkpoint(tmp_path):
    folder, _ = made(tmp_path, "bert", makers.word_piece)
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match="has a body without a head"):
        trained.find(folder)
