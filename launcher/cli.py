"""The commands of llm-launch: they start, watch and plan runs, and import nothing heavy before they are asked to.

Progress goes to standard error; standard output carries what was asked for, with --json as one object in one line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.slurm import commands
from llm_dist.errors import Exit, exit_code_of

app = typer.Typer(
    help="Start, watch and plan training runs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


Source = Annotated[str, typer.Argument(metavar="CONFIG_OR_RUN", help="Run file (.toml, .json) or run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Keys of the run file to set.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


@app.command(
    epilog=_examples(
        "llm-launch local configs/demo.toml --ranks 2",
        "llm-launch local configs/demo.toml --ranks 2 engine.name=zero optim.lr=1e-3",
        "llm-launch local runs/demo --ranks 4 run.steps=2000",
        "llm-launch local runs/demo --ranks 4 --accept optim.lr optim.lr=1e-4",
    )
)
def local(
    source: Source,
    overrides: Overrides = None,
    *,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; one per GPU, else 1, when absent.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Failures in a row without a newer checkpoint.")] = 3,
    accept: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A key that may change from now on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where ranks meet; chosen when absent.")] = None,
    as_json: Json = False,
) -> None:
    """Train on this machine; resumes by itself, and restarts the ranks when one dies.

    Exit codes: 0 finished, 75 stopped after saving, 2 something for you to mend, 1 gave up.
    """

    def action() -> int:
        from launcher import submission
        from launcher.local import supervise

        wanted = submission.Wanted(source, overrides or [], accept or [], ranks, max_restarts, port)
        job = submission.prepare(wanted)
        outcome = supervise(job)
        if as_json:
            _print_json(outcome.as_table(job))
        return outcome.exit_code

    raise typer.Exit(exit_code_of(action))


@app.command(
    epilog=_examples(
        "llm-launch status runs/demo",
        "llm-launch status runs/demo --json",
    )
)
def status(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder; the newest in runs/.")] = None,
    as_json: Json = False,
) -> None:
    """Say where a run is: step, loss, speed, time left, checkpoint, attempts, job and why it waits, first error."""

    def action() -> int:
        from dataclasses import asdict

        from launcher.listing import meant
        from launcher.slurm import standing
        from launcher.status import read_status, render

        folder = meant(run)
        found, job = read_status(folder), standing.look(folder)
        if as_json:
            _print_json({**asdict(found), "slurm": job and asdict(job)})
        else:
            print(render(found), *(standing.lines(job) if job else []), sep="\n")
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


@app.command(
    epilog=_examples(
        "llm-launch fork runs/demo --step 400 --out runs/annealed run.steps=500 optim.total_steps=500 "
        "optim.schedule=wsd optim.decay_fraction=0.2",
        "llm-launch fork runs/demo --out runs/lower optim.lr=1e-4",
    )
)
def fork(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    step: Annotated[int | None, typer.Option(min=0, help="Checkpoint of this step instead of the latest.")] = None,
    as_json: Json = False,
) -> None:
    """Make a new run that goes on from a checkpoint of another one, with another schedule, mixture or length."""

    def action() -> int:
        from dataclasses import asdict

        from launcher.fork import fork as make

        made = make(run, out, step, overrides or [])
        if as_json:
            _print_json(asdict(made))
        else:
            changes = f", with other {', '.join(made.changed)}" if made.changed else ""
            print(f"{made.run}: {made.parent} from step {made.step} on, to step {made.steps}{changes}")
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


@app.command(
    epilog=_examples(
        "llm-launch plan configs/demo.toml --ranks 2",
        "llm-launch plan configs/7b.toml --ranks 64 --gpu H100 --price 2.5",
        "llm-launch plan configs/7b.toml --ranks 8 --gpu H200 engine.name=zero --json",
    )
)
def plan(
    source: Source,
    overrides: Overrides = None,
    *,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, one per GPU.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="H100, H200, B200, A100-80, A100-40, L40S or 4090.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU hour, in your currency.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run needs before it is paid for: memory, traffic, time, cost."""

    def action() -> int:
        from launcher import planning
        from launcher.plan_table import render
        from llm_dist import config

        wanted = config.load(source, overrides or [])
        data = planning.data_size(wanted, must_exist=False)
        if data.num_tokens is None:
            places = ", ".join(wanted.data.sources.values())
            print(f"{places} is not there yet: plan.vocabulary_tokens is assumed", file=sys.stderr)
        made = planning.plan_of(wanted, data, ranks, gpu, price)
        suggestion = planning.what_fits(wanted, data.vocabulary_tokens, made)
        if as_json:
            _print_json({**made.as_table(), "suggestion": suggestion})
        else:
            print(render(wanted, made, suggestion))
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


@app.command(
    epilog=_examples(
        "llm-launch check",
        "llm-launch check runs/demo --min-disk 200 --gpus 8",
    )
)
def check(
    folder: Annotated[Path, typer.Argument(metavar="[RUN_OR_FOLDER]", help="Where a run writes.")] = Path(),
    *,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that there must be.")] = None,
    min_disk: Annotated[float, typer.Option(min=0, metavar="GIB", help="Free in the folder.")] = 5.0,
    min_memory: Annotated[float, typer.Option(min=0, metavar="GIB", help="Free on this machine.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Check this machine before ranks start: disk, memory, GPUs, matmul rate.

    Exit codes: 0 no faults, 2 some, each in one line.
    """

    def action() -> int:
        from launcher.preflight.check import check_here
        from launcher.preflight.judge import Limits
        from launcher.preflight.report import show

        verdict = check_here(folder, Limits.of_gib(min_disk, min_memory, gpus))
        if as_json:
            _print_json(verdict.as_table())
        else:
            show(verdict)
        return Exit.USER_ERROR if verdict.faults else Exit.DONE

    raise typer.Exit(exit_code_of(action))


commands.add_to(app, _examples)


def _print_json(table: dict[str, Any]) -> None:
    sys.stderr.flush()
    print(json.dumps(table), flush=True)


def main() -> None:
    """Entry point of llm-launch."""
    app(prog_name="llm-launch")


if __name__ == "__main__":
    main()
