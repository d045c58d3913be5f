"""From text to values: counts, sizes, ratios, dtypes, NAME=PATH."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

from moetool.errors import ConfigError

MAX_EXPONENT = 1000  # the digits of a number beyond it, written out, could fill the memory
# What models compute in: safetensors' name -> that of torch and of config.json.
FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def decimal(text: str) -> Decimal:
    """A number of 0 or more, exactly as typed.

    Raises:
        ConfigError: it is none.
    """
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ConfigError(f"'{text}' is not a number") from None
    if not value.is_finite() or value < 0:
        raise ConfigError(f"{text} is not a number of 0 or more")
    if value and abs(value.adjusted()) > MAX_EXPONENT:
        raise ConfigError(f"{text} is out of range: give a number between 1e-{MAX_EXPONENT} and 1e{MAX_EXPONENT}")
    return Decimal(f"{value.normalize():f}")  # 0.50 is the recipe of 0.5


def ratio(text: str) -> Decimal:
    """A share between 0 and 1, exactly as typed.

    Raises:
        ConfigError: it is none.
    """
    value = decimal(text)
    if value > 1:
        raise ConfigError(f"{text} is not between 0 and 1")
    return value


def exact_fraction(option: str, value: Fraction | Decimal | float | str) -> Fraction:
    """A number as the exact decimal typed (0.3 is 3/10).

    Raises:
        ConfigError: it is not a number; names the option.
    """
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option} '{value}': not a number") from None


def long_dtype(text: str) -> str:
    """The name that is recorded: `bf16` is `bfloat16`."""
    return _LONG.get(text, text)


def short_dtype(name: str, flag: str) -> str:
    """safetensors' name of a dtype; `auto` stays."""
    return next((short for short, long in FLOAT_DTYPES.items() if long == name), "auto")


def parse_size(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes, in decimal units.

    Raises:
        ConfigError: it is none of these, or so few bytes that a unit was forgotten.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"'{text}' is not a size; write it as 5GB or 500MB")
    if match and not match[2] and size < 10**6:
        raise ConfigError(f"'{text}' means {size} bytes; if {match[1]} GB were meant, write {match[1]}GB")
    return size


def parse_count(text: str) -> int:
    """`2B`, `500M`, `10k` or a plain number of at least 1.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().lower().replace("_", ""))
    number = Decimal(match[1]) * _COUNTS[match[2]] if match else Decimal(0)
    if number < 1 or number != int(number):
        raise ConfigError(f"'{text}' is not a count; write it as 2B, 500M, 10k or 4096")
    return int(number)


def named(values: Sequence[str], flag: str, what: str = "PATH", example: str = "src.jsonl") -> dict[str, str]:
    """Split repeated NAME=PATH values at the first `=`.

    Args:
        values: as typed.
        flag: of the option.
        what: stands behind the name, in errors.
        example: of that.

    Raises:
        ConfigError: a value without a name or path, or a name given twice.
    """
    paths: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            alone = Path(value).stem if what == "PATH" else ""
            typed = f"{name or 'code'}={path or example}" if equals else f"{alone or 'code'}={value}"
            raise ConfigError(f"{flag} '{value}': expected NAME={what}, such as {flag} {typed}")
        if name in paths:
            raise ConfigError(f"{flag}: the name '{name}' is given twice")
        paths[name] = path
    return paths


def named_numbers(values: Sequence[str], flag: str) -> dict[str, float]:
    """Split repeated NAME=NUMBER values; the numbers are above 0.

    Raises:
        ConfigError: a value without a name or such a number, or a name given twice.
    """
    numbers = {}
    for name, text in named(values, flag).items():
        try:
            numbers[name] = float(text)
        except ValueError:
            numbers[name] = -1.0
        if not 0 < numbers[name] < math.inf:
            raise ConfigError(f"{flag} {name}={text}: a number above 0 is needed")
    return numbers
