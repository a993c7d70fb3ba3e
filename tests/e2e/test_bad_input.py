"""What a person can get wrong: one line that names the thing, the value, the rule and a way out; exit code 2."""

from __future__ import annotations

import gzip
import json
import shutil
import socket

import pytest
from typer.testing import CliRunner

from launcher import cli as launcher_cli
from tests.e2e.commands import Said, llm_dist
from tests.e2e.conftest import tokenized

pytestmark = pytest.mark.e2e


def llm_launch(*words):
    result = CliRunner().invoke(launcher_cli.app, [str(word) for word in words], catch_exceptions=False)
    return Said(result.exit_code, result.stdout, result.stderr)


GOOD = json.dumps({"text": "Return the number of items."}).encode() + b"\n"
TEXTS = {
    "missing.txt": (None, ["missing.txt", "no such"]),
    "empty.txt": (b"", ["no document"]),
    "no-lines.jsonl": (b"\n\n", ["no document"]),
    "broken.jsonl": (GOOD + b'{"text": "half\n', ["broken.jsonl: line 2: ", "JSON"]),
    "list.jsonl": (GOOD + b"[1, 2]\n", ["list.jsonl: line 2: "]),
    "field.jsonl": (GOOD + b'{"body": "x"}\n', ["field.jsonl: line 2: ", "text"]),
    "number.jsonl": (b'{"text": 7}\n', ["number.jsonl: line 1: ", "text"]),
    "latin.txt": ("d\xe9j\xe0 vu".encode("latin-1"), ["latin.txt", "UTF-8"]),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:-20], ["cut.jsonl.gz"]),
    "fake.txt.gz": (b"this is no gzip", ["fake.txt.gz"]),
    "fake.txt.zst": (b"this is no zstd", ["fake.txt.zst"]),
    "fake.parquet": (b"this is no parquet", ["fake.parquet"]),
    "strange.docx": (b"PK", ["strange.docx"]),
}


@pytest.mark.parametrize("command", ["tokenizer train", "tokenize"])
@pytest.mark.parametrize("name", TEXTS)
def test_text(name, command, tokenizer, tmp_path):
    content, wanted = TEXTS[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    options = ["--vocab-size", "400", "--type", "byte-bpe"] if "train" in command else ["--tokenizer", tokenizer]
    mistake = llm_dist(*command.split(), path, "--out", tmp_path / "out", *options).mistake
    for words in wanted:
        assert words in mistake
    assert not (tmp_path / "out" / "train").exists()


def test_an_empty_folder_is_no_corpus(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert "empty" in llm_dist("tokenize", tmp_path / "empty", *words).mistake


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "byte-bpe"])
@pytest.mark.parametrize("size", [100, 60_000])
def test_vocabulary_that_the_text_does_not_allow(kind, size, corpus, tmp_path):
    words = ("--type", kind, "--vocab-size", size, "--out", tmp_path / "out")
    mistake = llm_dist("tokenizer", "train", corpus, *words).mistake
    assert str(size) in mistake
    assert not (tmp_path / "out").exists()


def test_tokenizer_folder_that_is_none(corpus, tmp_path):
    words = ("--tokenizer", tmp_path, "--out", tmp_path / "out")
    assert str(tmp_path) in llm_dist("tokenize", corpus, *words).mistake


def test_shard_folder_that_is_none(tmp_path):
    for command in ("inspect", "verify"):
        assert str(tmp_path) in llm_dist("data", command, tmp_path).mistake


def test_steps_that_are_no_range(run_file):
    assert "A:B" in llm_dist("data", "order", run_file, "--steps", "5").mistake
    none = llm_dist("data", "order", run_file, "--steps", "0:5", "--ranks", "0")
    assert none.code == 2
    assert "Invalid value for '--ranks'" in none.err


CONFIGS = {
    "unknown key": (
        ["optim.learning_rate=1"],
        ["optim.learning_rate is not a key of a run file; [optim] has name, lr, "],
    ),
    "misspelt key": (["batch.token_per_step=1"], ["did you mean batch.tokens_per_step?"]),
    "unknown section": (
        ["optimizer.lr=1"],
        ["optimizer is not a key", "the sections are run, model, data, batch, optim, "],
    ),
    "wrong type": (["model.layers=two"], ["model.layers='two'", "integer"]),
    "wrong choice": (["engine.name=zeus"], ["engine.name='zeus'", "'plain', 'zero' or 'fsdp'"]),
    "below the bound": (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
    "no override": (["optim.lr"], ["optim.lr", "section.key=value"]),
    "tokens per step": (["batch.tokens_per_step=100"], ["batch.tokens_per_step=100", "multiple of", "nearest: 96"]),
    "too long a sequence": (["data.sequence_tokens=128"], ["data.sequence_tokens=128", "model.max_sequence_tokens=64"]),
    "heads": (["model.heads=3"], ["model.d_model=32", "model.heads=3"]),
    "warm-up": (["optim.warmup_steps=9"], ["optim.warmup_steps=9", "8 steps"]),
    "no shards": (["data.train=nowhere"], ["data.train=nowhere: ", "llm-dist tokenize makes one"]),
    "no held-out shards": (["data.holdout=nowhere"], ["data.holdout=nowhere: "]),
    "shard ranks": (["engine.shard_ranks=1"], ["engine.shard_ranks", 'engine.name="fsdp"']),
    "no weights to start from": (["init.from=nowhere"], ["init.from", "nowhere"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_run_file(case, run_file, run_folder):
    overrides, wanted = CONFIGS[case]
    mistake = llm_dist("train", run_file, *overrides).mistake
    for words in wanted:
        assert words in mistake
    assert not (run_folder / "checkpoints" / "step_00000004").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("run = 7", "run=7"), ("run = [", "at end of document"), (b"\xff\xfe", "UTF-8"), ("", "run is missing")],
)
def test_text_that_is_no_run_file(text, wanted, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = llm_dist("train", path)
    assert said.code == 2
    assert all(line.startswith(f"error: {path}: ") for line in said.err.splitlines())
    assert wanted in said.err


def test_shards_shorter_than_a_sequence(run_file, corpus, tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Return the number of items.\n\nReturn the items.\n")
    shards = tokenized(path, tokenizer, tmp_path / "short")
    mistake = llm_dist("train", run_file, f"data.train={shards}/train").mistake
    assert "data.sequence_tokens=32" in mistake


def test_held_out_data_of_another_tokenizer(run_file, finished, other_shards):
    mistake = llm_dist("train", run_file, f"data.holdout={other_shards}/holdout").mistake
    assert mistake.startswith(f"data.holdout={other_shards}/holdout was made with another tokenizer")
    mistake = llm_dist("eval", finished, "--data", other_shards / "holdout").mistake
    assert mistake.startswith(f"{other_shards}/holdout was made with another tokenizer than this model")


def test_damaged_shard_is_named_when_it_is_trained_on(run_file, run_folder, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    (tar,) = (tmp_path / "shards" / "train").glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    mistake = llm_dist("train", run_file, f"data.train={tmp_path}/shards/train").mistake
    assert str(tar) in mistake
    assert llm_dist("data", "verify", tmp_path / "shards" / "train").code == 1


def test_folders_that_are_no_run(run_file, run_folder, tmp_path, shards):
    words = ("is neither a run folder", "no config.json")
    for command in (["eval", tmp_path, "--data", shards], ["generate", tmp_path], ["export", tmp_path, "--out", "x"]):
        mistake = llm_dist(*command).mistake
        assert all(word in mistake for word in words)
    assert "is not a run folder" in llm_dist("train", tmp_path).mistake
    assert "is not a run folder" in llm_dist("curve", tmp_path).mistake
    run_folder.mkdir(parents=True)
    (run_folder / "thesis.doc").write_text("precious")
    assert "exists and is not a run folder; choose another run.name or run.dir" in llm_dist("train", run_file).mistake
    assert [path.name for path in run_folder.iterdir()] == ["thesis.doc"]


def test_run_folder_that_cannot_be_written(run_file, tmp_path):
    (tmp_path / "file").touch()
    mistake = llm_dist("train", run_file, f"run.dir={tmp_path}/file").mistake
    assert f"{tmp_path}/file/tiny: cannot write the run folder" in mistake
    assert "choose another run.dir" in mistake


def test_checkpoint_that_is_not_there(finished, shards, tmp_path):
    data = ("--data", shards / "holdout")
    assert "no complete checkpoint of step 5; it has 4, 8" in llm_dist("eval", finished, *data, "--step", "5").mistake
    assert "--step 4 and --best" in llm_dist("eval", finished, *data, "--step", "4", "--best").mistake
    one = finished / "checkpoints" / "step_00000004"
    assert "name its run folder" in llm_dist("generate", one, "--step", "4").mistake


def test_export_never_overwrites(finished, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert str(tmp_path) in llm_dist("export", finished, "--out", tmp_path).mistake
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_sampling_that_means_nothing(finished):
    assert "temperature=-1" in llm_dist("generate", finished, "--temperature", "-1").mistake
    assert "top_p=0" in llm_dist("generate", finished, "--top-p", "0").mistake
    assert "max" in llm_dist("generate", finished, "--max-tokens", "-1").mistake
    assert "64" in llm_dist("generate", finished, "--prompt", "word " * 100).mistake


def test_port_in_use(run_file, run_folder):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        mistake = llm_launch("local", run_file, "--ranks", "2", "--port", port).mistake
    assert mistake.startswith(f"--port {port} is in use")
    assert not run_folder.exists()


def test_more_ranks_than_the_machine_holds(run_file, run_folder):
    mistake = llm_launch("local", run_file, "--ranks", "2048", "batch.tokens_per_step=262144").mistake
    assert mistake.startswith("--ranks 2048")
    assert "start fewer" in mistake or "start at most" in mistake
    assert not run_folder.exists()


def test_half_a_launch(run_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "start with llm-launch or torchrun, or unset WORLD_SIZE" in llm_dist("train", run_file).mistake
