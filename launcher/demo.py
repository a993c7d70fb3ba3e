"""`make demo`: the whole way on this machine, each command shown as a person would type it.

Raw text -> tokenizer -> token shards -> two ranks of ZeRO-2 in bf16, one of them killed half-way -> perplexity,
a sample, a picture and a Hugging Face model.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import demo_text
from llm_dist.errors import Exit, UserError, exit_code_of

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
RANKS = 2
SMALLEST_TEXT_BYTES = 20_000
PROMPT = "The "


def main() -> None:
    """Entry point of `python -m launcher.demo`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", help="files or folders of your own; default: the prose CPython carries")
    parser.add_argument("--out", default="demo", help="folder to make (default: demo)")
    arguments = parser.parse_args()
    sys.exit(exit_code_of(lambda: demo(arguments.text, Path(arguments.out))))


def demo(text: Sequence[str] | None, out: Path) -> Exit:
    """Run the way from `text` and leave everything under `out`."""
    began = time.monotonic()
    _make_room(out)
    inputs = list(text) if text else [_own_corpus(out)]
    vocabulary = _vocabulary_for(_bytes_of(inputs))
    tokenizer, shards, run = str(out / "tokenizer"), out / "shards", out / "runs" / "demo"
    _say("1/7  a tokenizer is trained")
    _tool("tokenizer", "train", *inputs, "--vocab-size", str(vocabulary), "--type", "byte-bpe", "--out", tokenizer)
    _say("2/7  the text becomes token shards, 2 % of it held out")
    _tool("tokenize", *inputs, "--tokenizer", tokenizer, "--out", str(shards), "--holdout", "0.02")
    _say(f"3/7  {RANKS} ranks train; half-way one is killed, and the run goes on by itself")
    _train(out, shards, run)
    _say("4/7  the held-out text is scored")
    scored = _tool("eval", str(run), "--data", str(shards / "holdout"))
    _say("5/7  the model writes")
    _tool("generate", str(run), "--prompt", PROMPT, "--max-tokens", "60", "--temperature", "0.7")
    _say("6/7  the loss curve is drawn")
    picture = _tool("curve", str(run))["picture"]
    _say("7/7  the model is exported for Hugging Face")
    exported = _tool("export", str(run), "--out", str(out / "model"))
    held_out = f"perplexity {scored['perplexity']:.1f}, {scored['bits_per_byte']:.3f} bits per byte held out"
    print(
        f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes: raw text to a model, through a kill and a resume.\n"
        f"  run       {run}  ({held_out})\n"
        f"  curve     {picture}  (or: .venv/bin/tensorboard --logdir {run}/tensorboard)\n"
        f"  model     {exported['out']}  ({exported['hugging_face_class']}, loads with transformers)\n"
        f"  next      .venv/bin/llm-launch local {run} --ranks {RANKS} run.steps=600    trains on from here"
    )
    return Exit.DONE


def _make_room(out: Path) -> None:
    """A demo starts afresh, but deletes only what a demo made."""
    marker = out / ".made-by-demo"
    if out.exists() and not marker.exists():
        raise UserError(f"{out} exists and was not made by the demo; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def _own_corpus(out: Path) -> str:
    path = out / "text" / "python.jsonl"
    path.parent.mkdir()
    documents = demo_text.write_corpus(path)
    _say(f"0/7  {documents} documents of CPython's own prose, {path.stat().st_size / 1e6:.1f} MB, in {path}")
    return str(path)


def _bytes_of(inputs: Sequence[str]) -> int:
    paths = [Path(name) for name in inputs]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give TEXT a file or folder of text")
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    if total < SMALLEST_TEXT_BYTES:
        raise UserError(f"{total} bytes of text are too few to learn from; give at least {SMALLEST_TEXT_BYTES:,}")
    return total


def _vocabulary_for(num_bytes: int) -> int:
    """About one token for 200 bytes of text, between 512 and 4096."""
    return max(512, min(4096, 1 << (num_bytes // 200).bit_length() - 1))


def _train(out: Path, shards: Path, run: Path) -> None:
    overrides = [f"run.dir={run.parent}", f"data.train={shards}/train", f"data.holdout={shards}/holdout"]
    command = ["llm-launch", "local", str(CONFIG), "--ranks", str(RANKS), *overrides]
    killer = threading.Thread(target=_kill_half_way, args=(run,), daemon=True)
    killer.start()
    _call(command)


def _kill_half_way(run: Path) -> None:
    """SIGKILL rank 0 once half of the steps and a checkpoint are behind it."""
    while not (run / "config.json").exists():
        time.sleep(0.2)
    half = json.loads((run / "config.json").read_text())["run"]["steps"] // 2
    while True:
        time.sleep(0.2)
        beat = _heartbeat(run)
        if beat and beat["step"] >= half and list(run.glob("checkpoints/step_*/manifest.json")):
            _say(f"     the demo kills rank 0 now (kill -9 {beat['pid']}), after step {beat['step']}")
            os.kill(beat["pid"], signal.SIGKILL)
            return


def _heartbeat(run: Path) -> dict[str, Any] | None:
    path = run / "heartbeat.json"
    return json.loads(path.read_text()) if path.exists() else None


def _tool(*words: str) -> dict[str, Any]:
    """Run an llm-dist command, show its results, return them as a table."""
    printed = _call(["llm-dist", *words, "--json"]).splitlines()
    table: dict[str, Any] = json.loads(printed[-1])
    return table


def _call(command: list[str]) -> str:
    """Run a command of this environment, its progress on the terminal; returns its standard output."""
    print(f"$ {shlex.join(word for word in command if word != '--json')}", flush=True)
    program = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([program, *command[1:]], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the demo stopped: {shlex.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def _say(line: str) -> None:
    print(f"\n{line}" if line[0] != " " else line, flush=True)


if __name__ == "__main__":
    main()
