"""`llm-dist`: one command per thing a person does. Each imports its room when it runs, so that --help answers at once.

Manners of every command: progress on standard error, results on standard output, with --json one JSON object as its
last line; a user's mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llm_dist import cli_scoring as scoring
from llm_dist import cli_writing as writing
from llm_dist.cli_manners import Best, Checkpoint, Json, Precision, Step
from llm_dist.cli_manners import examples as _examples
from llm_dist.cli_manners import finish as _finish
from llm_dist.cli_manners import show as _show
from llm_dist.errors import UserError, exit_code_of

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}
app = typer.Typer(help="From raw text to a trained, evaluated, exported language model.", **SETTINGS)
tokenizer_app = typer.Typer(help="Train or import tokenizers.", **SETTINGS)
data_app = typer.Typer(help="Look into token shards.", **SETTINGS)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

Inputs = Annotated[
    list[str],
    typer.Argument(metavar="INPUT...", help="Files, folders, globs of .txt .jsonl .parquet .tar .arrow; - is stdin."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to make.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE...]", help="Override keys.")]
Source = Annotated[str, typer.Argument(metavar="CONFIG_OR_RUN", help="Run file (.toml) or run folder.")]
HuggingFaceFolder = Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Hugging Face folder.")]
Split = Annotated[Literal["file", "blank-line", "line"], typer.Option(help="What a document is in .txt.")]
OnBad = Annotated[Literal["stop", "skip"], typer.Option(help="At a broken record: stop, or skip and count it.")]


@tokenizer_app.command("train", epilog=_examples("llm-dist tokenizer train corpus/ --vocab-size 8192 --out tokenizer"))
def tokenizer_train(
    inputs: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary, special ones included.")],
    out: Out,
    kind: Annotated[Literal["bpe", "unigram", "wordpiece", "byte-bpe"], typer.Option("--type")] = "bpe",
    lowercase: Annotated[bool, typer.Option(help="wordpiece: fold case.")] = False,
    split: Split = "file",
    on_bad: OnBad = "stop",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on raw text."""

    def work() -> Any:
        from llm_dist import tokenizer_training
        from llm_dist.data.documents import Tally, read_documents

        texts = (d.text for d in read_documents(inputs, split=split, on_bad=on_bad, tally=Tally()))
        return tokenizer_training.train(texts, kind, vocab_size, out, lowercase=lowercase)

    _finish(work, as_json)


@tokenizer_app.command("import", epilog=_examples("llm-dist tokenizer import llama-hf --out tokenizer"))
def tokenizer_import(folder: HuggingFaceFolder, out: Out, as_json: Json = False) -> None:
    """Take over the tokenizer of a Hugging Face folder: the same ids."""

    def work() -> Any:
        from llm_dist.tokenizer_import import import_tokenizer

        return import_tokenizer(folder, out)

    _finish(work, as_json)


@app.command(epilog=_examples("llm-dist tokenize corpus/ --tokenizer tokenizer --out shards --holdout 0.01"))
def tokenize(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.")],
    out: Out,
    holdout: Annotated[float, typer.Option(help="Share of the text held out for evaluation.")] = 0.01,
    split: Split = "file",
    on_bad: OnBad = "stop",
    seed: Annotated[int, typer.Option(help="Seeds the order of documents and what is held out.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Turn raw text into token shards: OUT/train and OUT/holdout."""

    def work() -> Any:
        from llm_dist.data.tokenize import tokenize as run

        return run(inputs, tokenizer, out, holdout=holdout, split=split, on_bad=on_bad, seed=seed, workers=workers)

    _finish(work, as_json)


@data_app.command("inspect", epilog=_examples("llm-dist data inspect shards/train"))
def data_inspect(
    folder: Annotated[str, typer.Argument(help="Shard folder, or URL of one.")], as_json: Json = False
) -> None:
    """Show what a shard folder holds."""

    def work() -> Any:
        from llm_dist.data.survey import survey

        return survey(folder)

    _finish(work, as_json)


@data_app.command("verify", epilog=_examples("llm-dist data verify shards/train"))
def data_verify(
    folder: Annotated[Path, typer.Argument(help="Shard folder on this machine.")], as_json: Json = False
) -> None:
    """Recompute every checksum and count; name each damaged shard; exit code 1 when there is one."""

    def work() -> int:
        from llm_dist.data.verify import verify

        damages = verify(folder)
        _show({"folder": str(folder), "damaged": [asdict(damage) for damage in damages]}, as_json)
        return int(bool(damages))

    raise typer.Exit(exit_code_of(work))


@data_app.command("order", epilog=_examples("llm-dist data order runs/demo --steps 0:100 --ranks 8"))
def data_order(
    source: Source,
    steps: Annotated[str, typer.Option(help="Range A:B of steps, B excluded.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that would read it; no hash depends on them.")] = 1,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Hash the tokens that a range of steps reads: equal hashes mean equal data in equal order."""

    def work() -> Any:
        from llm_dist import config
        from llm_dist.data.opening import open_reading

        run = config.load(source, overrides or ())
        chosen = _range(steps)
        reading = open_reading(run)
        return {
            "hash": reading.order_hash(chosen, ranks),
            "steps": steps,
            "ranks": ranks,
            "sequences_per_step": run.sequences_per_step,
            "epochs_before": reading.epochs(chosen.start),
            "epochs_after": reading.epochs(chosen.stop),
        }

    _finish(work, as_json)


@data_app.command("trace", epilog=_examples("llm-dist data trace runs/demo --step 812"))
def data_trace(
    source: Source,
    step: Annotated[int, typer.Option(min=1, help="Which step, as metrics number them: the first is 1.")],
    max_characters: Annotated[int, typer.Option(min=0, help="Most characters of text to show per document.")] = 80,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Name the documents that a step read: source file, shard, chunk, tokens, text; one line per row and document."""

    def work() -> int:
        from llm_dist import config
        from llm_dist.data.opening import open_reading
        from llm_dist.data.trace import check_same_data, trace

        run = config.load(source, overrides or ())
        reading = open_reading(run)
        record = Path(source) / "source.json"
        if record.is_file():
            check_same_data(reading, json.loads(record.read_text())["fingerprints"])
        found = trace(reading, step, max_characters)
        if as_json:
            _show(found, as_json)
        else:
            print(*found.lines(), sep="\n")
        return 0

    raise typer.Exit(exit_code_of(work))


@app.command(
    epilog=_examples(
        "llm-dist train configs/demo.toml run.steps=200", "torchrun --nproc-per-node 8 -m llm_dist train RUN"
    )
)
def train(
    source: Source,
    overrides: Overrides = None,
    accept: Annotated[list[str] | None, typer.Option(help="Key that may change from here on.")] = None,
    as_json: Json = False,
) -> None:
    """Train, or go on with, a run: as one rank alone or as one of those torchrun or llm-launch started."""

    def work() -> int:
        from llm_dist.train.start import start

        code = start(source, overrides or (), accept or ())
        if as_json:
            _show({"exit_code": int(code), "exit": code.name.lower()}, as_json)
        return code

    raise typer.Exit(exit_code_of(work))


app.command(
    "eval",
    epilog=_examples(
        "llm-dist eval runs/demo --data shards/holdout --json",
        "llm-dist eval runs/tagger --data test.conll --report errors",
    ),
)(scoring.evaluate)
app.command(epilog=_examples("llm-dist compare runs/a runs/b --data test.tsv --metric macro_f1"))(scoring.compare)
app.command(epilog=_examples("llm-dist predict runs/classifier texts.txt --out labels.jsonl"))(scoring.predict)


app.command(
    epilog=_examples(
        'llm-dist generate runs/demo --prompt "The world" --temperature 0.8 --top-k 50',
        "llm-dist generate runs/demo --prompts prompts.txt --min-p 0.05 --json",
    )
)(writing.generate)
app.command(epilog=_examples('llm-dist attention runs/demo --text "The world" --out attention.html'))(writing.attention)


@app.command(epilog=_examples("llm-dist export runs/demo --out demo-hf"))
def export(
    checkpoint: Checkpoint,
    out: Out,
    dtype: Annotated[Precision, typer.Option(help="Of the exported weights.")] = "fp32",
    adapter: Annotated[bool, typer.Option("--adapter", help="Only what lora.rank trained, as PEFT reads it.")] = False,
    step: Step = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face folder that transformers loads with no custom code."""

    def work() -> Any:
        from llm_dist import trained

        found = trained.find(checkpoint, step, best)
        return trained.export_adapter_to(found, out) if adapter else trained.export_to(found, out, dtype)

    _finish(work, as_json)


@app.command("import", epilog=_examples("llm-dist import llama-hf --out llama"))
def import_folder(folder: HuggingFaceFolder, out: Out, as_json: Json = False) -> None:
    """Make a tokenizer folder and a run file that go on training a Hugging Face folder."""

    def work() -> Any:
        from llm_dist.exchange.prepare import prepare

        return prepare(folder, out)

    _finish(work, as_json)


@app.command(epilog=_examples("llm-dist curve runs/demo --out loss.png"))
def curve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write; loss.png in the run folder by default.")] = None,
    as_json: Json = False,
) -> None:
    """Draw the loss curve of a run."""

    def work() -> Any:
        from llm_dist import curve as picture

        return picture.draw(run, out)

    _finish(work, as_json)


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"--steps {text} must read A:B with A < B, for example 0:100")
    return range(int(first), int(last))


def main() -> None:
    """Entry point of the command."""
    app()
