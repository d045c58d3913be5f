"""Declaring an option: once, as a field of a frozen dataclass.

`num_experts: int = option("Routed experts.", 8, min=2)` gives the field its type and default, and everything
else its help: the command line, `--config`, moetool.yaml and docs/cli.md are made from it
(`commands/options.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from moetool import registry
from moetool.errors import ConfigError
from moetool.values import long_dtype

Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Option:
    """A field's properties on the command line, besides its name, type and default.

    Attributes:
        help: one sentence.
        flag: how it is typed, where that is not `--field-name` (and `--no-field-name` for a bool).
        positional: it is an argument, not an option.
        panel: of --help.
        metavar: stands for the value in --help.
        shown: the default in words, where it is not a fixed value.
        min: smallest value.
        max: largest value.
        names: the values, with completion and suggestions; of an option NAME=..., what stands before `=`.
        what: what a name is called in errors.
        completed: what a shell completes, where other values are fine too.
        typed: type of the typed value, where it is not the field's.
        parse: typed text -> value, which moetool.yaml records.
        make: (recorded value, `--flag`) -> the field's value; of an option that repeats, all values at once.
        needs: another field, and a function that says for which of its values this option has an effect.
        unread: the field's value where it has no effect (`...`: as it is), so that equal results have equal recipes.
        defines: it makes another run of a resumed one.
        recorded: it is kept in moetool.yaml.
        after: the option that it follows in --help, where that is not the order of the fields.
    """

    help: str
    flag: str = ""
    positional: bool = False
    panel: str | None = None
    metavar: str | None = None
    shown: str = ""
    min: float | None = None
    max: float | None = None
    names: Collection[str] = ()
    what: str = ""
    completed: Collection[str] = ()
    typed: Any = None
    parse: Callable[[str], Any] | None = None
    make: Callable[[Any, str], Any] | None = None
    needs: tuple[str, Callable[[Any], bool]] | None = None
    unread: Any = ...
    defines: bool = False
    recorded: bool = True
    after: str = ""


def option(help: str, default: Any = MISSING, *, kind: str = "", **more: Any) -> Any:
    """A field of an options dataclass.

    Args:
        help: of the option.
        default: `dict` gives each instance an empty one; none at all makes the option required.
        kind: of the registry, whose names are the values.
        more: see `Option`.
    """
    if kind:
        more = {"names": registry.REGISTRY[kind], "what": kind} | more
    if "names" in more:
        more = {"metavar": "|".join(more["names"])} | more
    metadata = {"option": Option(help, **more)}
    if default is dict:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options(config: Any) -> dict[str, Option]:
    """The options of a dataclass (or an instance) by field name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(config) if "option" in f.metadata}


def flag(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.rstrip("_").replace("_", "-")


def without_effect(values: Any, declared: Mapping[str, Option]) -> list[tuple[str, str]]:
    """The options that others leave without effect, each with the one that does.

    Args:
        values: has the options' values as attributes.
        declared: the options by name.
    """
    needing = [(name, *one.needs) for name, one in declared.items() if one.needs]
    return [(name, other) for name, other, works in needing if not works(getattr(values, other))]


def as_read(config: Any) -> Any:
    """The config with the options that have no effect at their neutral values."""
    declared = options(config)
    ignored = {name: declared[name].unread for name, _ in without_effect(config, declared)}
    return dataclasses.replace(config, **{name: value for name, value in ignored.items() if value is not ...})


def check_name(declared: Option, text: str) -> None:
    """Refuse a value that is not among an option's names.

    Raises:
        ConfigError: names the nearest and all.
    """
    name = text.partition("=")[0]
    if name not in declared.names:
        near = registry.suggest(name, declared.names)
        raise ConfigError(f"unknown {declared.what} '{name}'{near}; choose from {', '.join(declared.names)}")


# Options that several commands have.


def same(config: Any, name: str, default: Any = ..., **more: Any) -> Any:
    """An option of another command's config, under the same name and with the same meaning.

    Args:
        config: that declares it.
        name: of the field.
        default: where that is another.
        more: see `Option`, where that is different.
    """
    declared = options(config)[name]
    usual = next(field.default for field in dataclasses.fields(config) if field.name == name)
    metadata = {"option": dataclasses.replace(declared, **more)}
    return dataclasses.field(default=usual if default is ... else default, metadata=metadata)


def text_field_option(panel: str | None = None, whose: str = "the text", **more: Any) -> Any:
    """The field of a document that holds its text."""
    return option(f"Field or column with {whose}.", "text", panel=panel, metavar="NAME", **more)


def document_option(panel: str | None = None, **more: Any) -> Any:
    """The rule for documents in a plain-text file."""
    return option(
        "How to split plain-text files into documents. In other formats, each row is a document.",
        "file",
        panel=panel,
        **more,
    )


def dtype_option(help: str, panel: str | None = None, **more: Any) -> Any:
    """The dtype of weights."""
    return option(help, "auto", panel=panel, typed=Dtype, parse=long_dtype, **more)


def device_option(panel: str | None = None, **more: Any) -> Any:
    """The device on which a model runs."""
    return option("Device: auto, cpu, cuda, cuda:1, mps.", "auto", panel=panel, metavar="NAME", **more)


def device_map_option(panel: str | None = None, **more: Any) -> Any:
    """How a model is spread over devices."""
    return option("Spread the model over devices, such as auto.", None, panel=panel, metavar="MAP", **more)


def workers_option() -> Any:
    """How many processes work."""
    return option("Worker processes.", None, min=1, shown="one per core")


def unpickle_option() -> Any:
    """Whether pickled weights may be read."""
    return option(
        "If there are no safetensors, read pickled weights (pytorch_model.bin) with torch's restricted unpickler.",
        False, flag="--unpickle",
    )  # fmt: skip


def check_device(config: Any) -> None:
    """Refuse a device beside a map of devices.

    Raises:
        ConfigError: both are given.
    """
    if config.device_map and config.device != "auto":
        raise ConfigError("--device and --device-map exclude each other")
