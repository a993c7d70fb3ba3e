from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from llm_dist.config import LANGUAGE, Heads, Model, RopeScaling
from llm_dist.errors import UserError
from llm_dist.exchange import export as export_room
from llm_dist.exchange.export import export
from llm_dist.exchange.table import rows
from llm_dist.model.hugging_face import hugging_face_class, why_not_exportable
from llm_dist.model.size import parameter_shapes
from llm_dist.model.transformer import Transformer
from tests.unit.model.shapes import VOCABULARY_TOKENS, built, small, some_ids

CLASSES = {
    "llama": "LlamaForCausalLM",
    "llama-grouped": "LlamaForCausalLM",
    "llama-tied": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt2-untied": "GPT2LMHeadModel",
    "gpt2-sinusoidal": "GPT2LMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "mistral": "MistralForCausalLM",
    "bert": "BertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
}


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


@pytest.mark.parametrize("kind", CLASSES)
def test_transformers_computes_the_same_logits(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    ours = noisy(small(kind, rope_theta=500.0, norm_eps=1e-3))
    name = export_of(ours, tmp_path / "out")
    assert name == CLASSES[kind]
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs).__name__ == name and not report["missing_keys"] and not report["unexpected_keys"]
    ids = some_ids(num_tokens=40)
    with torch.no_grad():
        logits, expected = ours.head.logits(ours(ids)), theirs(ids).logits
    assert logits.shape == expected.shape == (2, 40, VOCABULARY_TOKENS)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", CLASSES)
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


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    export_of(built(small("gpt2")), tmp_path / "out")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


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


PAIRS, CLASS_OF_TEXT, CLASS_OF_TOKEN = Heads(pair=True), Heads(False, classes=3), Heads(False, False, 3, True)
NOT_EXPORTABLE = [
    ("llama", {"positions": "learned"}, LANGUAGE, 'model.positions=learned with model.norm=rms; exports with "rotary"'),
    ("llama", {"feed_forward": "geglu"}, LANGUAGE, "model.feed_forward=geglu"),
    ("llama", {"norm_position": "post"}, LANGUAGE, "model.norm_position=post"),
    ("llama", {"biases": "all", "window_tokens": 4}, LANGUAGE, "model.window_tokens=4"),
    ("llama", {"d_model": 30, "d_head": 8}, LANGUAGE, "model.heads=4"),
    ("qwen3", {"biases": "qkv"}, LANGUAGE, "model.biases=qkv"),
    ("mistral", {"global_every": 2}, LANGUAGE, "model.global_every=2"),
    ("mistral", {"window_rope_theta": 10.0}, LANGUAGE, "model.window_rope_theta=10.0"),
    ("gpt2", {"positions": "rotary"}, LANGUAGE, 'exports with "learned" or "sinusoidal"'),
    ("gpt2", {"kv_heads": 2}, LANGUAGE, "model.kv_heads=2"),
    ("gpt2", {"d_head": 16}, LANGUAGE, "model.d_head=16"),
    ("gpt2", {"biases": "none"}, LANGUAGE, 'model.biases=none with model.norm=layer; exports with "all"'),
    ("bert-rotary-geglu", {}, LANGUAGE, "model.positions=rotary with model.norm_position=post"),
    ("bert-pre-norm", {}, LANGUAGE, "model.positions=learned with model.norm_position=pre"),
    ("classic", {}, LANGUAGE, "model.embedding_norm=false"),
    ("bert", {"head_transform": False}, LANGUAGE, "model.head_transform=false"),
    ("modernbert", {"rope_scaling": RopeScaling(factor=2.0)}, LANGUAGE, "model.rope_scaling="),
    ("modernbert", {}, PAIRS, "a head for pairs"),
    ("modernbert", {}, CLASS_OF_TEXT, "classes with model.norm_position=pre"),
    ("llama", {}, CLASS_OF_TEXT, "Llama's head for them has no bias"),
    ("bert", {}, Heads(classes=3), "a head for classes beside one for tokens"),
]


@pytest.mark.parametrize(("kind", "changes", "heads", "said"), NOT_EXPORTABLE)
def test_each_key_that_no_class_knows_is_named(kind, changes, heads, said):
    model = small(kind, **changes)
    assert said in str(why_not_exportable(model, heads))
    assert hugging_face_class(model, heads) is None


@pytest.mark.parametrize(
    ("kind", "changes", "heads", "name"),
    [
        ("bert", {"segments": 1}, LANGUAGE, "RobertaForMaskedLM"),
        ("bert", {"segments": 1, "feed_forward": "relu"}, LANGUAGE, "BertForMaskedLM"),
        ("bert", {"segments": 1}, PAIRS, "BertForPreTraining"),
        ("bert", {"head_transform": False}, CLASS_OF_TEXT, "BertForSequenceClassification"),
        ("bert", {"segments": 1}, CLASS_OF_TOKEN, "RobertaForTokenClassification"),
        ("gpt2", {}, CLASS_OF_TOKEN, "GPT2ForTokenClassification"),
        ("qwen2", {"window_tokens": 4, "global_every": 2}, LANGUAGE, "Qwen2ForCausalLM"),
        ("modernbert", {"biases": "all", "norm_bias": True}, LANGUAGE, "ModernBertForMaskedLM"),
    ],
)
def test_the_keys_decide_the_class(kind, changes, heads, name):
    assert hugging_face_class(small(kind, **changes), heads) == name


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"segments": 0}, {"segments": 1}, {"positions": "sinusoidal", "segments": 1}])
def test_tables_that_we_do_without_are_exported(changes, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra llm_dist[hf]")
    ours = noisy(small("bert", **changes))
    theirs = getattr(transformers, export_of(ours, tmp_path / "out")).from_pretrained(tmp_path / "out")
    ids = some_ids().clamp(min=8)
    torch.testing.assert_close(theirs(ids).logits, ours.language.logits(ours(ids)), rtol=1e-5, atol=1e-5)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_room, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export_of(built(small("llama")), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer"}
