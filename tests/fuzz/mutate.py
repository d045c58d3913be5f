"""Hostile variants of sound input, structure-aware for JSON, byte by byte for all else.

Every function draws from a `random.Random`: one with a seed, or hypothesis' own, which can then shrink
what it found.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# Texts that `dump` writes as so many brackets: documents that deep cannot be copied in Python.
DEEP = {f"{depth} deep": depth for depth in (60, 150, 900, 5000)}

TEXTS = (
    "",
    " ",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "\x9b2J",
    "a\nb\r\nmoetool: c",
    "\u202egnp.exe",
    "\u2028",
    "\ud800",
    "\U000e0041",
    "[bold]x[/bold]",
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    "<script>alert(1)</script>",
    "</script><img src=x>",
    "{{7*7}}",
    "{layer}",
    "{0.__class__}",
    "%s%n%d",
    "$\\frac{$",
    "../../escape",
    "/dev/zero",
    "/etc/passwd",
    "~root/x",
    ".",
    "..",
    "nul\x00byte",
    "a" * 300,
    "x" * 100_000,
    "é" * 50,
    "owner/name",
    "owner/name@../..",
    "hf:owner/name",
    "inf",
    "nan",
    "1e999",
    "0x10",
    "١٢",
    "-0",
    "true",
    "null",
    "pickle",
    "model.safetensors",
    "F32",
    "BF16",
    "F8_E4M3",
    "llama",
    "mixtral",
    "upcycle",
    "cpt",
)  # fmt: skip
NUMBERS: tuple[int | float, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**12,
    10**18,
    10**400,
    10**4000,
    -(2**63),
    -(10**400),
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1, 2], {"a": 1}, {"": ""}, [0] * 1000, *DEEP)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    level = [document]
    while level:
        one = level.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        level += [one[key] for key in keys if isinstance(one[key], (dict, list))]
    return found


def hostile_value(random: Random, old: Any = None) -> Any:
    """A value to put in place of another, often one near it."""
    kind = random.randrange(4)
    if kind == 0 and type(old) in (int, float) and abs(old) < 10**9:
        return random.choice((old + 1, old - 1, -old, old * 2, old * 10**6, float(old), str(old), [old]))
    if kind == 0 and isinstance(old, str):
        return random.choice((old + random.choice(TEXTS), old[:-1], old.upper(), [old], {old: old}, old * 3))
    return copy.deepcopy(random.choice((TEXTS, NUMBERS, OTHERS)[random.randrange(3)]))


def mutate_json(document: Any, random: Random) -> Any:
    """A variant of a JSON document: up to four places replaced, taken out, doubled or swapped."""
    document = copy.deepcopy(document)
    for _ in range(random.randrange(1, 5)):
        places = _places(document)
        if not places or random.randrange(60) == 0:
            document = hostile_value(random, document)
            continue
        container, key = random.choice(places)
        act = random.randrange(8)
        if act < 5:
            container[key] = hostile_value(random, container[key])
        elif act == 5:
            del container[key]
        elif act == 6 and isinstance(container, dict):
            container[random.choice(TEXTS)[:200]] = copy.deepcopy(container[key])
        else:
            other, place = random.choice(places)
            container[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else hostile_value(random))
    return document


_SPLICES = (
    b"[",
    b"{",
    b"]",
    b"}",
    b'"',
    b"\\",
    b"\\ud800",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"9" * 50,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"-",
    b"[" * 5000,
    b'{"a":' * 2000,
    b"*a",
    b"&a ",
    b"!!python/object/apply:os.system ",
    b"<<: ",
    b"? ",
    b"- ",
    b"\x1b[2J",
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\xff" * 8,
)  # fmt: skip


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """A variant of bytes: flipped, cut, doubled, or with something put in, in up to eight places."""
    new = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(new) + 1)
        act = random.randrange(7)
        if act == 0 and new:
            new[at % len(new)] ^= 1 << random.randrange(8)
        elif act == 1 and new:
            new[at % len(new)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif act == 2:
            new[at:at] = random.choice(_SPLICES)
        elif act == 3:
            del new[at : at + random.choice((1, 2, 8, 64))]
        elif act == 4:
            new[at:at] = new[at : at + random.choice((1, 8, 64))]
        elif act == 5 and random.randrange(4) == 0:
            del new[at:]
        else:
            splice = random.choice(_SPLICES)
            new[at : at + len(splice)] = splice
    return bytes(new)


def dump(document: Any) -> bytes:
    """JSON as a hostile writer may have it: NaN, half characters and depth included."""
    raw = json.dumps(document, allow_nan=True).encode()
    for text, depth in DEEP.items():
        raw = raw.replace(f'"{text}"'.encode(), b"[" * depth + b"]" * depth)
    return raw


def mutate(data: bytes, random: Random, as_json: bool = True) -> bytes:
    """A variant of a document's bytes; of JSON mostly by its structure."""
    if as_json and random.randrange(5):
        try:
            return dump(mutate_json(json.loads(data), random))
        except (ValueError, RecursionError):  # what was made of a variant may be no JSON, or too deep to copy
            return mutate_bytes(data, random)
    return mutate_bytes(data, random)
