"""How people with and without colour blindness see colours, as CIELAB."""

from __future__ import annotations

from typing import Any

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0, for linear RGB.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(color: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color))


def lab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    """CIELAB of linear sRGB, D65."""
    r, g, b = (min(1.0, max(0.0, v)) for v in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen_as(color: tuple[int, ...], matrix: Any) -> tuple[float, float, float]:
    return lab(tuple(sum(m * v for m, v in zip(line, linear(color), strict=True)) for line in matrix))


def rgb(text: str) -> tuple[int, ...]:
    """A colour such as 66eecc."""
    return tuple(int(text[i : i + 2], 16) for i in (0, 2, 4))


def distance(one: tuple[int, ...], other: tuple[int, ...], matrix: Any) -> float:
    """In CIELAB, Euclidean (CIE 1976)."""
    pairs = zip(seen_as(one, matrix), seen_as(other, matrix), strict=True)
    return float(sum((a - b) ** 2 for a, b in pairs) ** 0.5)


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """As in WCAG 2.2: relative luminance + 0.05, the lighter over the darker."""
    low, high = sorted(
        sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other)
    )
    return (high + 0.05) / (low + 0.05)
