"""Numbers for people."""

from __future__ import annotations

_MOST = 10**30  # whole numbers may be too long for a division


def size(num_bytes: float) -> str:
    """Bytes for people, in decimal units as disks are sold: `1.6 GB`."""
    num_bytes = min(num_bytes, _MOST)
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def count(number: float) -> str:
    """A large count for people: `1.40 B`, `152.3 M`."""
    number = min(number, _MOST)
    for unit in ("", " k", " M", " B"):
        if abs(number) < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def amount(number: float) -> str:
    """A number with as many digits as matter: `1,234`, `12.3`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
