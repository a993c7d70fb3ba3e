"""A TCP port for the ranks to meet at, which nobody else is likely to be given meanwhile."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from llm_dist.errors import UserError

_LOWEST = 10_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT serves; a listener's does not
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def choose_port(seed: int | None = None) -> int:
    """A free port below the range from which the kernel serves outgoing connections; looked for in the seed's order."""
    for port in random.Random(seed).sample(range(_LOWEST, _ephemeral_start()), k=64):
        if is_free(port):
            return port
    raise UserError("no free port among 64 tried; name one with --port")


def require_free(port: int) -> int:
    """The port the user named, if nobody listens there.

    Raises:
        UserError: it is taken or may not be used.
    """
    if not is_free(port):
        raise UserError(f"--port {port} is in use or not allowed; name another, or leave it out and one is chosen")
    return port


def _ephemeral_start() -> int:
    try:
        start = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        start = 32_768
    return start if start > _LOWEST + 1_000 else 32_768
