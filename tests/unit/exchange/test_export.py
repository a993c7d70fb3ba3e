from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from llm_dist.config import Model
from llm_dist.errors import UserError
from llm_dist.exchange import export as export_room
from llm_dist.exchange.export import export
from llm_dist.exchange.table import rows
from llm_dist.model.size import parameter_shapes
from llm_dist.model.transformer import Transformer
from tests.unit.model.shapes import KINDS, VOCABULARY_TOKENS, built, small, some_ids

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}


def export_of(transformer: Transformer, out: Path, **options) -> str:
    tokenizer_folder = out.parent / "tokenizer"
    tokenizer_folder.mkdir(exist_ok=True)
    (tokenizer_folder / "tokenizer.json").write_text("{}")
    weights = {name: parameter.detach() for name, parameter in transformer.named_parameters()}
    return export(
        weights, transformer.config, tokenizer_folder, out, real_vocabulary_tokens=VOCABULARY_TOKENS, **options
    )


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def noisy(model: Model) -> Transformer:
    """Weights under which norms and biases matter too."""
    transformer = built(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return transformer


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    ours = noisy(small(kind, rope_theta=500.0, norm_eps=1e-3))
    name = export_of(ours, tmp_path / "out")
    assert name == CLASSES[kind.split("-", maxsplit=1)[0]]
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == name and not report["missing_keys"] and not report["unexpected_keys"]
    ids = some_ids(num_tokens=40)
    with torch.no_grad():
        logits, expected = ours.head.logits(ours(ids)), theirs(ids).logits
    assert logits.shape == expected.shape == (2, 40, VOCABULARY_TOKENS)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_exported_once(kind):
    model = small(kind)
    used = [source for row in rows(model) for source in row.sources if not source.startswith("(")]
    assert sorted(used) == sorted(parameter_shapes(model, VOCABULARY_TOKENS))


def test_same_weights_give_the_same_bytes(tmp_path):
    transformer = built(small("gpt2"))
    for name in ("first", "second"):
        export_of(transformer, tmp_path / name)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert {file.name for file in tmp_path.iterdir()} == {"first", "second", "tokenizer"}


def test_large_models_are_split_and_still_load(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    monkeypatch.setattr(export_room, "MAX_FILE_BYTES", 20_000)
    ours = noisy(small("llama"))
    export_of(ours, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 25_000 for file in files)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_ids()).logits, ours.head.logits(ours(some_ids())), rtol=1e-4, atol=1e-4)


def test_bf16_is_the_rounded_weight(tmp_path):
    from safetensors.torch import load_file

    ours = built(small("llama"))
    export_of(ours, tmp_path / "out", dtype="bf16")
    written = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(written, ours.blocks[0].feed_forward.up.weight.detach().to(torch.bfloat16))


def test_a_folder_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    export_of(built(small("llama")), tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match="not an empty folder"):
        export_of(built(small("gpt2")), tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_what_no_class_computes_is_named(tmp_path):
    model = small("llama", positions="learned")
    with pytest.raises(UserError, match=r"model\.positions=learned"):
        export_of(built(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_room, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export_of(built(small("llama")), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer"}
