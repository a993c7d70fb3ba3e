"""The commands of llm-launch that speak with Slurm; each imports its rooms when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llm_dist.errors import Exit, exit_code_of

Source = Annotated[str, typer.Argument(metavar="CONFIG_OR_RUN", help="Run file (.toml, .json) or run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Keys of the run file to set.")
]
SiteFile = Annotated[Path | None, typer.Option("--site", help="Site profile; slurm/site.toml when absent.")]
Accept = Annotated[list[str] | None, typer.Option(metavar="KEY", help="A key that may change from now on.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, print the script, submit nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]


def slurm(
    source: Source,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="One rank each.")] = 0,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Where there are no GPUs.")] = None,
    time: Annotated[str, typer.Option(help="Time limit: minutes, H:MM:SS or D-HH:MM:SS.")] = "60",
    partition: str = "",
    account: str = "",
    qos: str = "",
    constraint: Annotated[str, typer.Option(help="Features of the nodes.")] = "",
    container: Annotated[str, typer.Option(metavar="IMAGE", help="Image, as the site's kind takes it.")] = "",
    spares: Annotated[int, typer.Option(min=0, help="Nodes more, to take the place of bad ones.")] = 0,
    chain: Annotated[int, typer.Option(min=1, help="Jobs that follow one another, where requeueing is forbidden.")] = 1,
    accept: Accept = None,
    option: Annotated[list[str] | None, typer.Option(help="One more option of sbatch, as --option=--mem=0.")] = None,
    live_code: Annotated[bool, typer.Option("--live-code", help="Run the code where it lies, not a copy.")] = False,
    site: SiteFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Submit a run to Slurm: it is checked first, then queued; the job resumes, restarts and requeues by itself."""

    def action() -> int:
        from launcher.slurm import script, submit
        from launcher.slurm import site as sites

        wanted = submit.Wanted(
            source=source,
            overrides=overrides or [],
            accepted=accept or [],
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            ranks_per_node=ranks_per_node,
            minutes=script.minutes_of(time),
            partition=partition,
            account=account,
            qos=qos,
            constraint=constraint,
            image=container,
            spares=spares,
            chain=chain,
            has_live_code=live_code,
            options=option or [],
        )
        return _submit(wanted, sites.load(site), dry_run, as_json)

    raise typer.Exit(exit_code_of(action))


def resume(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder; the newest in runs/.")] = None,
    overrides: Overrides = None,
    *,
    accept: Accept = None,
    site: SiteFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Submit a run again as it was submitted last, with the code as it is now; a held job is let go."""

    def action() -> int:
        from launcher.listing import meant
        from launcher.slurm import site as sites
        from launcher.slurm import submit
        from launcher.slurm.resuming import release_held, wanted_again

        folder = meant(run)
        if (number := release_held(folder)) is not None:
            print(f"{folder}: job {number} was held; let go")
            return Exit.DONE
        wanted: submit.Wanted = wanted_again(folder, overrides or [], accept or [])
        return _submit(wanted, sites.load(site), dry_run, as_json)

    raise typer.Exit(exit_code_of(action))


def _submit(wanted: Any, site: Any, dry_run: bool, as_json: bool) -> int:
    from dataclasses import asdict

    from launcher.slurm import controller, submit
    from launcher.slurm.freeze import PACKAGES

    run, shape, site = submit.prepare(wanted, site)
    text = submit.render(run, shape, site, wanted, PACKAGES, "0" * 16)
    verdict = controller.would_start(text)
    if dry_run:
        print(text, end="")
        print(f"Slurm: {verdict}", file=sys.stderr)
        return Exit.DONE
    done = submit.submit(run, shape, site, wanted)
    if as_json:
        print(json.dumps({"run": str(run.run.folder), **asdict(done)}))
    else:
        jobs = f"job {done.jobs[0]}" if len(done.jobs) == 1 else f"jobs {', '.join(done.jobs)}"
        folder = run.run.folder
        print(f"{folder}: {jobs}, {shape.nodes} nodes with {shape.ranks_per_node} ranks each")
        print(f"watch it with: llm-launch status {folder}; llm-launch logs -f {folder}")
    return Exit.DONE


def stop(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder; the newest in runs/.")] = None,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
) -> None:
    """Have a run save and end, wherever it is trained; nothing starts it again by itself."""

    def action() -> int:
        from launcher.listing import meant
        from launcher.slurm import stopping

        folder = meant(run)
        print(f"{folder}: {stopping.stop(folder)}", flush=True)
        if wait:
            stopping.wait_until_ended(folder)
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


def logs(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder; the newest in runs/.")] = None,
    *,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    job: Annotated[bool, typer.Option("--job", help="Of the newest Slurm job: starts and decisions.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0)] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what it gains, until Ctrl-C.")] = False,
) -> None:
    """Show the log of a rank, over all attempts."""

    def action() -> int:
        from launcher import logs as reading
        from launcher.listing import meant

        reading.show(reading.path_of(meant(run), None if job else rank), lines, follow)
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """One line for each run: state, step, loss, job."""

    def action() -> int:
        from dataclasses import asdict

        from launcher.listing import line_of, statuses
        from launcher.slurm import standing

        runs = statuses(folder)
        queue = standing.queue_of([Path(each.run) for each in runs])
        found = [(each, standing.look(Path(each.run), queue)) for each in runs]
        if as_json:
            print(json.dumps([{**asdict(each), "slurm": job and asdict(job)} for each, job in found]))
        else:
            for each, job in found:
                print(line_of(each, f"job {job.job} {job.words}" if job and job.state else ""))
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


def tokenize_at_scale(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, globs.")],
    *,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.")],
    out: Annotated[Path, typer.Option(help="Task 7 makes OUT/part_0007.")],
    tasks: Annotated[int, typer.Option(min=1, help="Tasks of the array; at most one per file.")],
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a task.")] = 4,
    time: Annotated[str, typer.Option(help="Time limit of a task.")] = "60",
    at_once: Annotated[int | None, typer.Option(min=1, help="Most tasks that may run at the same time.")] = None,
    holdout: Annotated[float, typer.Option(help="Share of the text held out for evaluation.")] = 0.01,
    split: Annotated[Literal["file", "blank-line", "line"], typer.Option(help="What a document is in .txt.")] = "file",
    on_bad: Annotated[Literal["stop", "skip"], typer.Option(help="At a broken record.")] = "stop",
    seed: int = 0,
    partition: str = "",
    account: str = "",
    site: SiteFile = None,
    dry_run: DryRun = False,
) -> None:
    """Tokenize many files with an array job; submitted again, only what is missing is done."""

    def action() -> int:
        from launcher.slurm import data_job, script
        from launcher.slurm import site as sites
        from launcher.slurm.freeze import PACKAGES

        wanted = data_job.Wanted(
            *(inputs, tokenizer, out, tasks, cpus, script.minutes_of(time), holdout, split, on_bad, seed),
            partition=partition,
            account=account,
            most_at_once=at_once,
        )
        profile = sites.load(site)
        plan = data_job.prepare(wanted, profile, PACKAGES)
        if not plan.missing:
            print(f"{out}: all {plan.tasks} tasks are finished")
        elif dry_run:
            print(plan.script, end="")
        else:
            job = data_job.submit(plan, wanted, profile)
            print(f"{out}: job {job}, {len(plan.missing)} of {plan.tasks} tasks; logs in {out}/logs")
        return Exit.DONE

    raise typer.Exit(exit_code_of(action))


def add_to(app: typer.Typer, examples: Any) -> None:
    """Register the commands; `examples` makes an epilog of lines."""
    app.command(
        epilog=examples(
            "llm-launch slurm configs/7b.toml --nodes 4 --gpus-per-node 8 --time 2-00:00:00",
            "llm-launch slurm configs/demo.toml --nodes 2 --ranks-per-node 2 --time 30 --dry-run",
            "llm-launch slurm runs/7b --nodes 8 --gpus-per-node 8 --time 1-00:00:00 --partition gpu run.steps=200000",
        )
    )(slurm)
    app.command(
        epilog=examples("llm-launch resume runs/7b", "llm-launch resume runs/7b --accept optim.lr optim.lr=1e-4")
    )(resume)
    app.command(epilog=examples("llm-launch stop runs/7b"))(stop)
    app.command(
        epilog=examples("llm-launch logs -f", "llm-launch logs runs/7b --rank 3 -n 100", "llm-launch logs --job")
    )(logs)
    data = typer.Typer(help="Data jobs on many nodes.", no_args_is_help=True, rich_markup_mode=None)
    many = "llm-launch slurm-data tokenize corpus/ --tokenizer tokenizer --out shards --tasks 64 --cpus 16"
    data.command("tokenize", epilog=examples(many))(tokenize_at_scale)
    app.add_typer(data, name="slurm-data")
    app.command("list", epilog=examples("llm-launch list", "llm-launch list /shared/runs --json"))(list_runs)
