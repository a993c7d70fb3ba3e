"""`make bench`: what is measured, as one table, and as JSON beside it.

python -m benchmarks                 the quick suites: loader, corpus, remote, tokenize, saving, step
python -m benchmarks ngram           half an hour: a trained model against a 5-gram
python -m benchmarks sst2 wnut17 novels  an hour: encoders fine-tuned, pretrained and not, beside baselines
python -m benchmarks launching       five minutes, root and Slurm: one launcher per node against one task per rank
python -m benchmarks --gpu           the step of larger models on one GPU
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

SUITES = ("loader", "corpus", "remote", "tokenize", "saving", "step", "ngram", "launching", "sst2", "wnut17", "novels")
QUICK = SUITES[:-5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; the quick ones by default")
    parser.add_argument("--gpu", action="store_true", help="measure the step on one GPU")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.json"), help="where the JSON goes")
    arguments, overrides = parser.parse_known_args()
    chosen = [word for word in arguments.suites if "=" not in word] or (["step"] if arguments.gpu else list(QUICK))
    overrides += [word for word in arguments.suites if "=" in word]
    if unknown := set(chosen) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    results: dict[str, Any] = {"machine": _machine(), "date": time.strftime("%Y-%m-%d")}
    for name in chosen:
        print(f"\n{name}", flush=True)
        results[name] = _measure(name, arguments.gpu, overrides)
        _show(results[name])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwritten to {arguments.out}")


def _measure(name: str, on_gpu: bool, overrides: list[str]) -> Any:
    if name in ("loader", "corpus", "remote", "tokenize", "saving", "launching"):
        return importlib.import_module(f"benchmarks.{name}").measure()
    if name in ("sst2", "wnut17", "novels"):
        return importlib.import_module("benchmarks.finetuning").measure(name, overrides)
    if name == "ngram":
        from benchmarks import ngram

        return ngram.measure(overrides)
    from benchmarks import step

    return step.measure(on_gpu)


def _machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"device": device, "python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _show(rows: Any) -> None:
    """A list of rows as a table; anything else line by line."""
    if not isinstance(rows, list):
        for name, value in rows.items():
            print(f"  {name:<20} {value}")
        return
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[column]) for line in cells)) for column, name in enumerate(names)]
    for line in (names, *cells):
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    main()
