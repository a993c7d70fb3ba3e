"""Who is at fault when nothing goes on: read off the heartbeats of all ranks, said in one line.

Training is in step, so that one rank that stays behind stops all; the others wait for it in a collective.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from llm_dist.train.heartbeat import Beat, Seen
from llm_dist.train.watch import BEFORE

LONG = 2.0
"""How much longer than other phases those may take that do much at once, before they are called a hang."""
_LONG_PHASES = {BEFORE, "build", "restore", "first_step", "eval", "save", "close"}
_WORDS = {"data": "data.loader", "step": "engine.train_step", "first_step": "the first engine.train_step"}
_WAITING_PHASES = {"agree", "replicas"}
_LOCAL_PHASES = {"data", "report"}
_RANKS_NAMED = 8


@dataclass(frozen=True)
class Verdict:
    """What is said about a hang."""

    words: str
    ranks: tuple[int, ...]
    """At fault; empty where that cannot be told."""
    step: int
    """Steps finished by the one that has finished the least."""


def patience(phase: str) -> float:
    """How many times `watch.hang_seconds` a phase may take without a sign that it goes on."""
    return LONG if phase in _LONG_PHASES else 1.0


def judge(seen: Sequence[Seen], hang_seconds: float) -> Verdict | None:
    """The verdict on all ranks; None where some rank still goes on, or is not known well enough yet."""
    if any(each.is_silent is None for each in seen):
        return None
    living = [each.beat for each in seen if each.beat is not None and not each.is_silent]
    silent = [each for each in seen if each.is_silent]
    if any(beat.idle_seconds < hang_seconds * (1.0 if silent else patience(beat.phase)) for beat in living):
        return None
    known = [each.beat for each in seen if each.beat is not None]
    step = min((beat.step for beat in known), default=0)
    is_closing = all(beat.phase == "close" for beat in living)
    gone = [each for each in silent if not (is_closing and each.beat is None)]
    if gone:
        ranks = tuple(each.rank for each in gone)
        return Verdict(f"{_silent(gone)}; {_rest(living)}", ranks, step)
    at_fault = _at_fault(living)
    rest = [beat for beat in living if beat not in at_fault]
    if not at_fault or not rest:
        return Verdict(_everybody(living), tuple(beat.rank for beat in at_fault), step)
    words = f"{_subject([beat.rank for beat in at_fault])} in {_place(at_fault[0])} at step {at_fault[0].step}"
    words += f", {at_fault[0].idle_seconds:.0f} s"
    return Verdict(f"{words}; {_rest(rest)}", tuple(beat.rank for beat in at_fault), step)


def _at_fault(living: Sequence[Beat]) -> list[Beat]:
    """Who does not wait while others do; else who is behind; else who is elsewhere than most."""
    if len(living) == 1:
        return list(living)
    waiting = [beat for beat in living if _waits(beat)]
    busy = [beat for beat in living if _waits(beat) is False]
    if waiting and busy:
        return busy
    last_step = min(beat.step for beat in living)
    behind = [beat for beat in living if beat.step == last_step]
    if len(behind) < len(living):
        return behind
    places = Counter((beat.phase, beat.waits_in, beat.line) for beat in living)
    most, count = places.most_common(1)[0]
    if 2 * count > len(living):
        return [beat for beat in living if (beat.phase, beat.waits_in, beat.line) != most]
    return []


def _waits(beat: Beat) -> bool | None:
    """Whether a rank waits for others; None where its phase may mean both, and the flight recorder is silent."""
    if beat.waits_in or beat.phase in _WAITING_PHASES:
        return True
    return False if beat.waits_in == "" or beat.phase in _LOCAL_PHASES else None


def _silent(gone: Sequence[Seen]) -> str:
    beat = gone[0].beat
    if beat is None:
        return f"{_subject([each.rank for each in gone], 'has left', 'have left')} or never began"
    words = _subject([each.rank for each in gone], "gives no sign of life", "give no sign of life")
    words += f", {time.time() - beat.time:.0f} s (process {beat.pid} on {beat.host} is {_state(beat)})"
    return f"{words}, last in {_place(beat)} at step {beat.step}"


def _state(beat: Beat) -> str:
    """What has become of a silent rank's process, where that can be asked."""
    if beat.host != socket.gethostname():
        return "stopped, dead or cut off"
    try:
        state = psutil.Process(beat.pid).status()
    except psutil.Error:
        return "dead"
    if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "dead" if state == psutil.STATUS_ZOMBIE else "alive, but lets no other thread run"


def _rest(others: Sequence[Beat]) -> str:
    if not others:
        return "no other rank is left"
    places = ", ".join(dict.fromkeys(_place(beat) for beat in others))
    do_wait = all(_waits(beat) for beat in others)
    if len(others) == 1:
        return f"rank {others[0].rank} {'waits' if do_wait else 'is'} in {places}"
    return f"the others {'wait' if do_wait else 'are'} in {places}"


def _everybody(living: Sequence[Beat]) -> str:
    places = ", ".join(dict.fromkeys(_place(beat) for beat in living))
    seconds = min(beat.idle_seconds for beat in living)
    who = "all ranks are" if len(living) > 1 else f"rank {living[0].rank} is"
    end = ", and none goes on" if len(living) > 1 else ""
    return f"{who} in {places} at step {living[0].step}, {seconds:.0f} s{end}"


def _subject(ranks: Sequence[int], one: str = "is", many: str = "are") -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    named = ", ".join(map(str, ranks[:_RANKS_NAMED]))
    rest = f" and {len(ranks) - _RANKS_NAMED} more" if len(ranks) > _RANKS_NAMED else ""
    return f"ranks {named}{rest} {many}"


def _place(beat: Beat) -> str:
    inside = [word for word in (beat.waits_in, beat.line) if word]
    return _WORDS.get(beat.phase, beat.phase) + (f" ({', '.join(inside)})" if inside else "")
