"""Numbers as a person says them."""

from __future__ import annotations


def bytes_in_words(number: float) -> str:
    """`1.50 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    return f"{number:.2f} TiB"


def count_in_words(number: float) -> str:
    """`124.4 M`."""
    for unit in ("", " K", " M", " B"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f} T"


def duration_in_words(seconds: float) -> str:
    """Two units are enough: `3 d 4 h`, `12 min 5 s`."""
    parts: list[str] = []
    left = round(seconds)
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
