"""What may change between two starts of one run: the rules that each key of the run file carries, and its owner."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from llm_dist.config import Config, fields
from llm_dist.errors import ResumeRefused


def check_resume(
    before: Config,
    now: Config,
    accepted: Sequence[str] = (),
    step: int = 0,
    way_out: str = "choose another run.name",
) -> list[str]:
    """Names of the `from_now` keys that change when `step` steps are finished; refuses what would make another run.

    `way_out` is what one does who wants another run.

    Raises:
        ResumeRefused: an identity key or a past segment of the mixture differs, or a `from_now` key differs and is not
            among `accepted`.
    """
    old, new = before.model_dump(by_alias=True), now.model_dump(by_alias=True)
    refused, changed = [], []
    for key, rule in fields().items():
        section, name = key.split(".")
        was, is_now = old[section][name], new[section][name]
        if key == "data.mixture" and (past := _past_that_differs(before, now, step)):
            refused.append(past)  # also where neither run file has segments, and the sources differ
            continue
        if was == is_now or rule == "free":
            continue
        if rule == "identity":
            refused.append(f"{key} was {was!r} and is now {is_now!r}: that is another run; {way_out}")
        elif key not in accepted:
            refused.append(f"{key} was {was!r} and is now {is_now!r}; add --accept {key} to change it from here on")
        else:
            changed.append(key)
    if refused:
        raise ResumeRefused("\n".join(refused))
    return changed


def check_owner(config_file: Path, accepted: Sequence[str] = ()) -> None:
    """Refuse a run that another user has written: what lies in its folder decides what this one computes.

    Raises:
        ResumeRefused: it is another user's, and `accepted` does not name `owner`.
    """
    owner = config_file.stat().st_uid
    if owner != os.getuid() and "owner" not in accepted:
        raise ResumeRefused(
            f"{config_file.parent} was written by another user, {_user(owner)}; add --accept owner to go on with it"
        )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"number {number}"


def _past_that_differs(before: Config, now: Config, step: int) -> str | None:
    was, is_now = before.data.segments_before(step), now.data.segments_before(step)
    if was == is_now:
        return None
    return (
        f"data.mixture: {step} steps are finished, and its segments before that were {_in_words(was)} and are now "
        f"{_in_words(is_now)}; keep them as they were and add a segment from the current step on"
    )


def _in_words(segments: list[tuple[int, dict[str, Fraction | None]]]) -> str:
    """Shares as people read them."""

    def words(shares: dict[str, Fraction | None]) -> str:
        each = (f"{name} {'by size' if share is None else f'{float(share):.4g}'}" for name, share in shares.items())
        return ", ".join(each)

    return "; ".join(f"{words(shares)} from step {first}" for first, shares in segments) or "none"
