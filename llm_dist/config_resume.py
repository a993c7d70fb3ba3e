"""What may change between two starts of one run: the rules that each key of the run file carries, applied."""

from __future__ import annotations

from collections.abc import Sequence

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
        if was == is_now or rule == "free":
            continue
        if rule == "identity":
            refused.append(f"{key} was {was!r} and is now {is_now!r}: that is another run; {way_out}")
        elif key == "data.mixture" and (past := _past_that_differs(before, now, step)):
            refused.append(past)
        elif key not in accepted:
            refused.append(f"{key} was {was!r} and is now {is_now!r}; add --accept {key} to change it from here on")
        else:
            changed.append(key)
    if refused:
        raise ResumeRefused("\n".join(refused))
    return changed


def _past_that_differs(before: Config, now: Config, step: int) -> str | None:
    was, is_now = before.data.segments_before(step), now.data.segments_before(step)
    if was == is_now:
        return None
    return (
        f"data.mixture: {step} steps are finished, and its segments before that were {was} and are now {is_now}; "
        "keep them as they were and add a segment from the current step on"
    )
