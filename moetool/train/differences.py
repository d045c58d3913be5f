"""The options in which two runs differ, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moetool.train.config import TrainConfig


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], whose: tuple[str, str] = ("before", "now")
) -> list[str]:
    """The options in which two identities differ, with both values and `whose` they are where they say something.

    A run from before an option was there has its default.
    """
    changed = []
    defaults = {field.name.replace("_", "-"): field.default for field in fields(TrainConfig)}
    for name in {**before, **now}:
        old, new = (identity.get(name, defaults.get(name)) for identity in (before, now))
        if old == new or name == "centred":  # which is as it began, whatever it is
            continue
        if name == "model":
            changed.append("MODEL (other files)")
        elif name == "teacher":
            changed.append(f"--teacher ({'new' if old is None else 'gone' if new is None else 'other files'})")
        elif name in ("train", "replay", "val") and isinstance(old, dict) and isinstance(new, dict):
            parts = [f"{key} ({_change(key, old, new)})" for key in {**old, **new} if old.get(key) != new.get(key)]
            changed.append(f"--{name} {', '.join(parts)}")
        else:
            changed.append(f"--{name} ({_plain(old)} {whose[0]}, {_plain(new)} {whose[1]})")
    return changed


def _change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "new" if name not in old else "gone" if name not in new else "other text"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_named(key, item) for key, item in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _named(name: str, value: Any) -> str:
    """A strategy that takes no coefficient has 0."""
    return name if value == 0 else f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
