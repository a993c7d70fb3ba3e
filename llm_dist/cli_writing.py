"""Commands of `llm-dist` that let a model write, and look into it while it reads."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_dist.cli_manners import Best, Checkpoint, Json, Step, show
from llm_dist.errors import UserError, exit_code_of

if TYPE_CHECKING:
    from llm_dist.generate import Sampling
    from llm_dist.tokenizer_chat import Message
    from llm_dist.trained import Trained


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from; may be empty.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Many: a line each in .txt, `prompt` of each line in .jsonl.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: how many are computed at once.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among the K likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest that make up this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Sample among those at least this times as likely as the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was read or written is less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds the sampling; prompt i of a file, from 0, has SEED + i.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt: for runs that learnt responses.")] = False,
    system: Annotated[str | None, typer.Option(help="What the answering side is told first, with --chat.")] = None,
    step: Step = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Let a model write."""

    def work() -> int:
        from llm_dist import trained
        from llm_dist.generate import Sampling
        from llm_dist.prompts import read_prompts

        if system is not None and not chat:
            raise UserError("--system is part of a conversation; add --chat")
        if prompt and prompts is not None:
            raise UserError("what to go on from? name either --prompt or --prompts")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        texts = [prompt] if prompts is None else read_prompts(prompts)
        said: list[str | list[Message]] = [_conversation(text, system) if chat else text for text in texts]
        source = trained.find(checkpoint, step, best)
        if not source.run.heads.language or not source.run.model.is_causal:
            raise UserError(f'{checkpoint}: objective.name="{source.run.objective.name}" does not go on with a text')
        if prompts is None:
            _write_one(source, said[0], max_tokens, sampling, seed, as_json)
        else:
            _write_all(source, texts, said, max_tokens, sampling, seed, batch, as_json)
        return 0

    raise typer.Exit(exit_code_of(work))


def attention(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Option(help="Text to read.")],
    out: Annotated[Path, typer.Option("--out", help="Picture (.png) or page (.html) to write.")],
    layer: Annotated[int | None, typer.Option(help="Only this layer; the first is 0.")] = None,
    head: Annotated[
        str, typer.Option(metavar="N|mean|all", help="A head, the first is 0; their mean; or all.")
    ] = "mean",
    step: Step = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Show what each token looks at: a row for the token that looks, a column for the one looked at."""

    def work() -> int:
        from llm_dist import attention_map, trained

        attention_map.check_place(out)
        source = trained.find(checkpoint, step, best)
        chosen = attention_map.choose(source.run.model, layer, head)
        ids = attention_map.ids_of(source.tokenizer, text, source.run.model)
        maps = attention_map.weights(source.model(), ids, chosen)
        tokens = attention_map.shown_tokens(source.tokenizer, ids)
        show(attention_map.draw(maps, tokens, out), as_json)
        return 0

    raise typer.Exit(exit_code_of(work))


def _write_one(
    source: Trained, said: str | list[Message], max_tokens: int, sampling: Sampling, seed: int, as_json: bool
) -> None:
    """Show the text as it comes."""
    from llm_dist.generate import generate as run

    stream = sys.stderr if as_json else sys.stdout
    stream.write(said if isinstance(said, str) else "")
    result = run(
        source.model(),
        source.tokenizer,
        said,
        max_tokens=max_tokens,
        **asdict(sampling),
        seed=seed,
        on_text=lambda text: (stream.write(text), stream.flush()),
    )
    stream.write("\n")
    if as_json:
        show(result, as_json)


def _write_all(
    source: Trained,
    texts: list[str],
    said: list[str | list[Message]],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    batch: int,
    as_json: bool,
) -> None:
    """Show each text when it is whole: a JSON line, or a block."""
    from llm_dist.generate import generate_all

    options = {"max_tokens": max_tokens, "seed": seed, "num_at_once": batch}
    found = generate_all(source.model(), source.tokenizer, said, sampling=sampling, **options)
    for number, (text, written) in enumerate(zip(texts, found, strict=True), start=1):
        if as_json:
            print(json.dumps({"prompt": text, **asdict(written)}), flush=True)
        else:
            print(f"--- {number} ---\n{text}{written.text}", flush=True)


def _conversation(prompt: str, system: str | None) -> list[Message]:
    from llm_dist.tokenizer_chat import Message

    if not prompt:
        raise UserError("--chat answers a prompt; give one with --prompt")
    return [*([] if system is None else [Message("system", system)]), Message("user", prompt)]
