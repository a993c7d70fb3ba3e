"""The error report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llm_dist.predictions.cases import Case, Judged
from llm_dist.predictions.measures import LabelScores

_MOST_LABELS = 40
"""A larger table of confusions is no use to the eye."""
_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .3rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e4e4e4 }
th { font-weight: 600 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
td.text { white-space: pre-wrap; overflow-wrap: anywhere } td.where { color: #777; font-size: .85em }
.bad { background: #fde2e0; border-radius: 3px; padding: 0 .2em } .bad small { color: #a3221a }
.tag { border-bottom: 2px solid #b9cfe8 } .tag small { color: #49698c }
"""


def page_of(title: str, scores: LabelScores, chosen: Sequence[Case], most_wrong: int) -> str:
    """The page; at most `most_wrong` of the wrong cases are shown."""
    wrong = [case for case in chosen if case.verdict == "wrong"]
    uncertain = [case for case in chosen if case.verdict == "uncertain"]
    shown = f", the surest {most_wrong} of {len(wrong)}" if len(wrong) > most_wrong else ""
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(summary(scores, len(wrong)))}</p>",
        _confusion(scores),
        f"<h2>Wrong, the surest first ({len(wrong)}{shown})</h2>",
        _table(wrong[:most_wrong]),
        f"<h2>Right, the least certain first ({len(uncertain)})</h2>",
        _table(uncertain),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def summary(scores: LabelScores, num_wrong: int) -> str:
    """What a reader wants to know first."""
    entities = f", entity F1 {scores.entities.f1.micro:.4f}" if scores.entities else ""
    return (
        f"{scores.examples} examples, {num_wrong} with a wrong label; accuracy {scores.accuracy:.4f}, "
        f"macro F1 {scores.f1.macro:.4f}{entities}"
    )


def _confusion(scores: LabelScores) -> str:
    names = [each.name for each in scores.classes]
    if len(names) > _MOST_LABELS:
        return ""
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    lines = [f"<h2>True label by predicted label</h2><table><tr><th></th>{head}</tr>"]
    for name, counts in zip(names, scores.confusion, strict=True):
        cells = "".join(_count(count, sum(counts), names[place] == name) for place, count in enumerate(counts))
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _count(count: int, of: int, is_right: bool) -> str:
    strength = count / of if of else 0.0
    colour = "70,130,90" if is_right else "200,70,60"
    return f'<td class="number" style="background:rgba({colour},{strength * 0.6:.2f})">{count:,}</td>'


def _table(chosen: Sequence[Case]) -> str:
    if not chosen:
        return "<p>None.</p>"
    head = '<tr><th class="number">probability</th><th>true</th><th>predicted</th><th>text</th><th>where</th></tr>'
    return "\n".join(["<table>", head, *map(_line, chosen), "</table>"])


def _line(case: Case) -> str:
    worst = case.worst
    text = escape(worst.text) if len(case.judged) == 1 else " ".join(map(_word, case.judged))
    return (
        f'<tr><td class="number">{worst.probability:.3f}</td><td>{escape(worst.true)}</td>'
        f'<td>{escape(worst.predicted)}</td><td class="text">{text}</td>'
        f'<td class="where">{escape(case.where)}</td></tr>'
    )


def _word(judged: Judged) -> str:
    word, true, predicted = escape(judged.text), escape(judged.true), escape(judged.predicted)
    if not judged.is_right:
        return f'<span class="bad">{word} <small>{true} &rarr; {predicted} {judged.probability:.2f}</small></span>'
    return word if judged.true == "O" else f'<span class="tag">{word} <small>{true}</small></span>'
