"""What a user can mend, and how a command ends.

A mistake the user can mend is a `UserError`: one line that names the key, the value, the rule and a way out.
Everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from enum import IntEnum

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Exit(IntEnum):
    """Exit codes that launchers and schedulers act on."""

    DONE = 0
    DEFECT = 1
    USER_ERROR = 2
    STOPPED = 75
    """Asked to stop; a complete checkpoint stands; start again to go on (Slurm's `RequeueExit` convention)."""
    HANG = 76
    """Nothing went on any more (`watch.hang_seconds`); start again to go on from the latest checkpoint."""
    SUPERSEDED = 77
    """A newer attempt has taken the run over: starting again would only take it away from that one."""
    LOST_CONTACT = 78
    """Another rank was gone; its own end says why."""


class UserError(Exception):
    """A mistake the user can mend; each line of the message is one mistake."""


class ResumeRefused(UserError):
    """The run folder holds another run than the one asked for; the message names the key that differs."""


def exit_code_of(action: Callable[[], int | None]) -> int:
    """Run `action`; print a `UserError`, or that the disk is full, as plain lines on standard error, no traceback."""
    try:
        return int(action() or Exit.DONE)
    except UserError as error:
        mistakes = str(error)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        mistakes = f"{error.filename or 'writing'}: {error.strerror}; free some space, then start again"
    for line in mistakes.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return Exit.USER_ERROR
