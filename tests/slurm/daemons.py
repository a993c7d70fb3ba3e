"""Programs that run beside the tests and never outlive them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Where daemons are found. Debian keeps them out of the PATH of plain users."""

LAST_LINES = 12


class CommandFailed(Exception):
    """A program said no; the message holds what it was and what it said."""


class Daemon:
    """A program in a process namespace of its own: with it the kernel ends all that it started, whatever that did.

    `setup` is shell that runs in the namespaces before the program does. When the thread that made the daemon ends, as
    it does when this process is killed, the kernel ends the daemon too.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        spaces: Sequence[str] = (),
        setup: str = "",
    ) -> None:
        self._log = log
        script = f'{setup}\necho ready\nread -r go\nexec "$@" </dev/null >>"$0" 2>&1'
        apart = ["unshare", "--pid", "--fork", "--kill-child", *spaces]
        command = ["setpriv", "--pdeathsig", "KILL", *apart, "--", "sh", "-ec", script, str(log), *words]
        with log.open("a") as stderr:
            self._outside = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                cwd=log.parent,
            )
        assert self._outside.stdin and self._outside.stdout
        with self._outside.stdin as order, self._outside.stdout as answer:
            if answer.readline() != b"ready\n":
                self._outside.kill()
                self._outside.wait()
                raise CommandFailed(f"no room for {words[0]}\n{last_lines(log)}")
            [inside] = psutil.Process(self._outside.pid).children()
            self.pid: int = inside.pid
            """As this machine counts. It is not given to another process before `stop` is done."""
            order.write(b"go\n")

    def is_alive(self) -> bool:
        return self._outside.poll() is None

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Fails early when the daemon has ended."""

        def asked_of_the_living() -> bool:
            if not self.is_alive():
                raise CommandFailed(f"{what}: it has ended\n{last_lines(self._log)}")
            return condition()

        wait_until(asked_of_the_living, seconds, what)

    def signal(self, number: int) -> None:
        assert self.is_alive(), f"it has ended already\n{last_lines(self._log)}"
        os.kill(self.pid, number)

    def stop(self, number: int) -> None:
        """Wait for its end, and so for the end of all it started."""
        if self.is_alive():
            os.kill(self.pid, number)
        self._outside.wait(timeout=30)


def run(words: Sequence[str], environment: Mapping[str, str], *, text: str | None = None, seconds: float = 60) -> str:
    """What a command prints."""
    ended = subprocess.run(
        words, env=environment, input=text, capture_output=True, text=True, check=False, timeout=seconds
    )
    if ended.returncode:
        raise CommandFailed(f"{' '.join(words)}: code {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended.stdout.rstrip()


def succeeds(words: Sequence[str], environment: Mapping[str, str]) -> bool:
    return subprocess.run(words, env=environment, capture_output=True, check=False, timeout=60).returncode == 0


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Ask until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


def last_lines(*logs: Path) -> str:
    """The ends of logs, for messages."""
    found = [log for log in logs if log.exists()]
    return "\n".join(f"{log.name}:\n" + "\n".join(log.read_text().splitlines()[-LAST_LINES:]) for log in found)
