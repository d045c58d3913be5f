"""The options that every command has, and how a configuration file stands in for flags."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from moetool import registry
from moetool.errors import ConfigError
from moetool.option import Option, check_name, flag, option, options, without_effect
from moetool.outside import read_bytes

MAX_CONFIG = 1_000_000  # bytes of a --config file
RECORDED = "moetool.recorded"  # where a call's context keeps the options that moetool.yaml holds


def read_config(path: Path, parameters: dict[str, bool]) -> dict[str, Any]:
    """Read a `--config` file: YAML, flag names without dashes (`_` for `-` accepted).

    Scalars stay text as typed (`0.10` is not read as a float), so that a value means the same in the
    file as on the command line.

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
            known = [flag(p)[2:] for p in parameters]
            near = registry.suggest(str(key).replace("_", "-"), known)
            raise ConfigError(f"--config {path}: unknown key '{key}'{near}; keys are {', '.join(known)}")
        if name in values:
            raise ConfigError(f"--config {path}: '{key}' is given twice")
        if value in ("null", "~"):
            continue
        if isinstance(value, dict) and parameters[name] and all(isinstance(v, str) for v in value.values()):
            if bare := [of for of, v in value.items() if not v]:
                raise ConfigError(
                    f"--config {path}: '{key}' has no value for '{bare[0]}'; in braces, quote values that hold a comma"
                )
            value = [f"{of}={v}" for of, v in value.items()]
        if (isinstance(value, dict) and not parameters[name]) or value == "":
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
    """A command whose typed positionals fill the places that `--config` leaves open."""

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
                error.message += "; repeat the option for each value: --train a=A --train b=B"
            raise


def _takes_list(command: Any) -> dict[str, bool]:
    """Parameter name -> whether it takes a list, for those that a configuration file may hold."""
    return {
        str(p.name): p.nargs == -1 or bool(getattr(p, "multiple", False))
        for p in command.params
        if p.name not in ("json", "quiet", "config", "help")
    }


@dataclass(frozen=True)
class Output:
    """How a command prints; every command has these."""

    json: bool = option(
        "Print one JSON document on stdout; messages go to stderr.",
        False, flag="--json", panel="Output", recorded=False,
    )  # fmt: skip
    quiet: bool = option("Print errors only.", False, flag="--quiet", panel="Output", recorded=False)
    config: Path | None = option(
        "YAML file with option names as keys. Options on the command line win.",
        None, flag="--config", panel="Output", metavar="FILE", recorded=False,
    )  # fmt: skip


def typer_command(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function that Typer turns into a command; it has a parameter for each option of `run`.

    Args:
        run: a command: takes the context, and dataclasses of options.
    """
    groups = {name: hint for name, hint in get_type_hints(run).items() if dataclasses.is_dataclass(hint)}

    def call(context: typer.Context, **values: Any) -> Any:
        typed = frozenset(name for name in values if _was_typed(context, name))
        with _as_usage():
            built = {name: _build(group, values) for name, group in groups.items()}
            together = SimpleNamespace(**{k: v for config in built.values() for k, v in vars(config).items()})
            for name, other in without_effect(together, {f.name: f.metadata["option"] for f in fields}):
                if name in typed:
                    value = getattr(together, other)
                    why = f"without {flag(other)}" if value is None else f"with {flag(other)} {value}"
                    raise ConfigError(f"{flag(name)} has no effect {why}")
            for config in built.values():
                if hasattr(config, "check"):
                    config.check(typed)
        context.meta[RECORDED] = {f.name for f in fields if f.metadata["option"].recorded}
        return run(context, **built)

    hints = {group: get_type_hints(group) for group in groups.values()}
    declared = [
        (field, hints[group][field.name])
        for group in groups.values()
        for field in dataclasses.fields(group)
        if "option" in field.metadata
    ]
    fields = [field for field, _ in declared]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
    for field, hint in _placed(declared):
        default = inspect.Parameter.empty if _required(field) else _typed_default(field)
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=_annotation(field, hint)))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


@contextmanager
def _as_usage() -> Iterator[None]:
    """Turn a ConfigError about options into a usage error."""
    try:
        yield
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None


def _was_typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter was typed on the command line, rather than in a configuration file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _build(group: Any, values: Mapping[str, Any]) -> Any:
    """Build an options dataclass from Typer's values; an empty list means the field's default."""
    built = {}
    for name, declared in options(group).items():
        value = values[name]
        if value is None or (isinstance(value, (list, tuple)) and not value):
            continue
        built[name] = declared.make(value, flag(name)) if declared.make else value
    return group(**built)


def _placed(declared: Sequence[tuple[Any, Any]], behind: str = "") -> Iterator[tuple[Any, Any]]:
    """Fields, each with its type, in the order of --help."""
    for field, hint in declared:
        if field.metadata["option"].after == behind:
            yield field, hint
            yield from _placed(declared, field.name)


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _given(default: Any) -> Any:
    """A default as Typer takes it."""
    return None if default is dataclasses.MISSING or default == () else default


def _typed_default(field: Any) -> Any:
    """A default as Typer takes it for the type that is typed: one value of an option that repeats is a list."""
    given = _given(field.default)
    repeats = get_origin(field.metadata["option"].typed) is list
    return [str(given)] if repeats and given is not None and not isinstance(given, (list, tuple)) else given


def _annotation(field: Any, hint: Any) -> Any:
    """The type that Typer reads a value as, with its text for --help."""
    declared: Option = field.metadata["option"]
    kind = declared.typed or hint
    if get_origin(kind) in (Mapping, Sequence):
        kind = list[str]
    elif declared.parse and not declared.typed:
        kind = str
    if not _required(field) and _given(field.default) is None and NoneType not in get_args(kind):
        kind = kind | None
    shown = f"{declared.help}  \\[default: {declared.shown}]" if declared.shown else declared.help
    more: dict[str, Any] = {
        "help": shown,
        "metavar": declared.metavar,
        "min": declared.min,
        "max": declared.max,
        "rich_help_panel": declared.panel,
        "show_default": not declared.shown and not _required(field) and _given(field.default) is not None,
    }
    if field.name == "config":
        more |= {"is_eager": True, "callback": _apply_config}
    elif declared.names or declared.parse:
        more["callback"] = _reader(declared)
    if words := declared.names or declared.completed:
        more["autocompletion"] = _completing(words)
    if declared.positional:
        return Annotated[kind, typer.Argument(**more)]
    return Annotated[kind, typer.Option(*filter(None, [declared.flag]), **more)]


def _reader(declared: Option) -> Callable[[Any], Any]:
    """An option callback that checks names and parses text."""

    def callback(value: Any) -> Any:
        with _as_usage():
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if declared.names and one is not None:
                    check_name(declared, one)
            return declared.parse(value) if declared.parse and value is not None else value

    return callback


def _completing(names: Collection[str]) -> Callable[[str], list[str]]:
    """The values of an option that a shell offers."""

    def offered(incomplete: str) -> list[str]:
        return list(names)

    return offered


def resolved_options(context: typer.Context, **more: Any) -> dict[str, Any]:
    """The options of a call, and `more` by field name, as a mapping that is itself a valid `--config` file."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value if isinstance(value, (bool, int, str)) else str(value)

    values = {str(p.name): (context.params | more).get(str(p.name)) for p in context.command.params}
    for p in context.command.params:  # an option that repeats, of which one value is the usual
        if isinstance(p.default, list) and len(values[str(p.name)] or ()) == 1:
            values[str(p.name)] = values[str(p.name)][0]  # type: ignore[index]
    return {
        flag(name)[2:]: plain(value)
        for name, value in values.items()
        if name in context.meta[RECORDED] and value is not None and value != [] and value != ()
    }


def options_text(context: typer.Context, **more: Any) -> str:
    """The content of `moetool.yaml`: the resolved options, see `resolved_options`."""
    import yaml

    text = yaml.safe_dump(resolved_options(context, **more), sort_keys=False, allow_unicode=True)
    return f"# moetool {context.command.name}\n{text}"


def write_options(context: typer.Context, folder: Path, **more: Any) -> None:
    """Leave `moetool.yaml` in a folder that a command has written, with `more` options by field name."""
    from moetool.checkpoint.folder import write_file

    write_file(folder / "moetool.yaml", options_text(context, **more).encode())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
