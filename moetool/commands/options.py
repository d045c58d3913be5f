"""The options that every command has, and how a configuration file stands in for flags."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from moetool import registry
from moetool.errors import ConfigError
from moetool.outside import read_bytes

MAX_CONFIG = 1_000_000  # bytes of a --config file
# Left out of moetool.yaml: how a run talks, and permissions that must be given anew each time.
NOT_RECORDED = {"json", "quiet", "config", "overwrite", "plan", "resume", "allow_code_execution"}


def read_config(path: Path, parameters: dict[str, bool]) -> dict[str, Any]:
    """Read a `--config` file: YAML, flag names without dashes (`_` for `-` accepted).

    Scalars stay the text that was typed (`0.10` is not read as a float), so that a value means the
    same in the file as on the command line.

    Args:
        path: the file.
        parameters: parameter name (with `_`) -> whether it takes a list.

    Returns:
        Parameter name -> text or list of texts.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, an unknown key or a wrong shape.
    """
    import yaml

    try:
        # A pipe is fine: the user named it. Tags make nothing but text, lists and mappings with this loader.
        text = read_bytes(path, MAX_CONFIG, ConfigError, pipe=True).decode("utf-8")
        document = yaml.load(text, Loader=yaml.BaseLoader)
    except ConfigError as error:
        raise ConfigError(f"--config {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: not valid YAML: nested too deeply") from None
    if document in (None, ""):
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: expected 'flag: value' lines, found a {type(document).__name__}")
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        name = f"{name}_" if f"{name}_" in parameters else name  # `--for`: a word of Python's
        if name not in parameters:
            known = [_flag(p) for p in parameters]
            near = registry.suggest(str(key).replace("_", "-"), known)
            raise ConfigError(f"--config {path}: unknown key '{key}'{near}; keys are {', '.join(known)}")
        if name in values:
            raise ConfigError(f"--config {path}: '{key}' is given twice")
        if value in ("null", "~"):
            continue
        if isinstance(value, dict) or value == "":
            raise ConfigError(f"--config {path}: '{key}' needs a value")
        if parameters[name]:
            value = value if isinstance(value, list) else [value]
        if isinstance(value, list) and (not parameters[name] or any(not isinstance(v, str) for v in value)):
            raise ConfigError(f"--config {path}: '{key}' takes {'plain values' if parameters[name] else 'one value'}")
        values[name] = value
    return values


def _apply_config(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None and not context.resilient_parsing:
        context.default_map = read_config(value, _takes_list(context.command))
    return value


class OpenPlaces(TyperCommand):
    """A command whose typed positionals go to the places that `--config` leaves open."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        places = [p for p in self.params if p.param_type_name == "argument" and p.nargs == 1]
        if len(places) > 1 and not ctx.resilient_parsing and any(a.partition("=")[0] == "--config" for a in args):
            given, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
            names = [str(place.name) for place in places]
            typed_ones = [given[name] for name in names if isinstance(given.get(name), str)]
            path = given.get("config")
            if isinstance(path, str) and 0 < len(typed_ones) < len(names) and not rest:
                file = read_config(Path(path), _takes_list(self))
                left = [name for name in names if name not in file]
                if not left:
                    either = " or ".join(name.upper() for name in names)
                    ctx.fail(
                        f"'{typed_ones[0]}' could be {either}, and --config {path} gives both: type"
                        f" {' '.join(name.upper() for name in names)}, or take one out of the file"
                    )
                if left != names[: len(left)] and len(left) == len(typed_ones):
                    before = [file[name] for name in names[: names.index(left[0])]]
                    args = [*before, *args]
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            if "unexpected extra" in error.message and "=" in error.message.partition("(")[2]:
                error.message += "; an option that repeats takes one value each: --train a=A --train b=B"
            raise


def _takes_list(command: Any) -> dict[str, bool]:
    """Parameter name -> whether it takes a list, for those that a configuration file may hold."""
    return {
        str(p.name): p.nargs == -1 or bool(getattr(p, "multiple", False))
        for p in command.params
        if p.name not in ("json", "quiet", "config", "help")
    }


JsonFlag = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr.", rich_help_panel="Output"),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel="Output")]
ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of flags without dashes; a flag given here wins over the file.",
        metavar="FILE",
        is_eager=True,
        callback=_apply_config,
        rich_help_panel="Output",
    ),
]


def one_of(kind: str) -> Callable[[str], str]:
    """An option callback that accepts the registry's names of a kind and suggests the nearest."""

    def callback(value: str) -> str:
        try:
            return registry.check(kind, value) if value is not None else value
        except ConfigError as error:
            raise typer.BadParameter(str(error)) from None

    return callback


def completing(names: Sequence[str]) -> Callable[[str], Sequence[str]]:
    """What a shell offers for the value of an option."""

    def offered(incomplete: str) -> Sequence[str]:
        return names

    return offered


def named_paths(values: list[str], flag: str) -> dict[str, str]:
    """Split repeated NAME=PATH values at the first `=`.

    Raises:
        typer.BadParameter: a value without a name or path, or a name given twice.
    """
    paths: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            example = f"{name or 'code'}={path or 'src.jsonl'}" if equals else f"{Path(value).stem or 'code'}={value}"
            raise typer.BadParameter(f"{flag} '{value}': expected NAME=PATH, such as {flag} {example}")
        if name in paths:
            raise typer.BadParameter(f"{flag}: the name '{name}' is given twice")
        paths[name] = path
    return paths


def resolved_options(context: typer.Context) -> dict[str, Any]:
    """The options of a call as a mapping that is itself a valid `--config` file."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if isinstance(value, (bool, int, str)) else str(value)

    values = {str(p.name): context.params.get(str(p.name)) for p in context.command.params}
    return {
        _flag(name): plain(value)
        for name, value in values.items()
        if name not in NOT_RECORDED and value is not None and value != [] and value != ()
    }


def _flag(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def options_text(context: typer.Context) -> str:
    """The content of `moetool.yaml`: the resolved options."""
    import yaml

    text = yaml.safe_dump(resolved_options(context), sort_keys=False, allow_unicode=True)
    return f"# moetool {context.command.name}\n{text}"


def write_options(context: typer.Context, folder: Path) -> None:
    """Leave `moetool.yaml` in a folder that a command has written."""
    from moetool.checkpoint.folder import write_file

    write_file(folder / "moetool.yaml", options_text(context).encode())


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


_LONG = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Dtype = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]


def long_dtype(value: str) -> str:
    """The name that is recorded: `bf16` is `bfloat16`."""
    return _LONG.get(value, value)


def parse_size(text: str) -> int:
    """`5GB`, `500MB` or a number of bytes, in decimal units.

    Raises:
        typer.BadParameter: it is none of these, or so few bytes that a unit was forgotten.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise typer.BadParameter(f"'{text}' is no size; write it as 5GB or 500MB")
    if match and not match[2] and size < 10**6:
        raise typer.BadParameter(f"'{text}' means {size} bytes; if {match[1]} GB were meant, write {match[1]}GB")
    return size


_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """`2B`, `500M`, `10k` or a plain number of at least 1.

    Raises:
        typer.BadParameter: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", str(text).strip().lower().replace("_", ""))
    number = Decimal(match[1]) * _COUNTS[match[2]] if match else Decimal(0)
    if number < 1 or number != int(number):
        raise typer.BadParameter(f"'{text}' is no count; write it as 2B, 500M, 10k or 4096")
    return int(number)


def typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter was typed on the command line, rather than in a configuration file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
