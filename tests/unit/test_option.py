"""An option is a field: what Typer, moetool.yaml and a run's identity make of it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moetool.cli import COMMANDS, app
from moetool.commands.options import Output, options_text, typer_command
from moetool.errors import ConfigError
from moetool.option import as_read, option, options
from moetool.recipe import UpcycleRecipe
from moetool.train.config import TrainConfig
from moetool.train.differences import differences
from moetool.values import decimal, named_numbers

COMMANDS_FOLDER = Path(__file__).parents[2] / "moetool" / "commands"


@dataclasses.dataclass(frozen=True)
class Fruit:
    name: str = option("Which.", positional=True, metavar="NAME")
    weight: Decimal = option("How much.", Decimal("0.5"), parse=decimal, metavar="KG")
    peeled: bool = option("Without its skin.", False)
    secret: bool = option("Not recorded.", False, flag="--secret", recorded=False)
    kind: str = option("Apple or pear.", "apple", names=["apple", "pear"], what="kind")
    worms: int = option("Only in apples.", 0, min=0, needs=("kind", "apple".__eq__), unread=-1, after="peeled")
    shares: Any = option("By person.", dict, typed=list[str], metavar="NAME=N", make=named_numbers)

    colour: str = "red"  # no option

    def check(self, typed: Collection[str]) -> None:
        if "peeled" in typed and self.weight == 0:
            raise ConfigError("nothing to peel")


@dataclasses.dataclass(frozen=True)
class Basket:
    colour: int | None = option("A field of this name in another group is no option.", None, after="shares")


def run(*arguments: str) -> tuple[int, Any]:
    seen: list[Any] = []

    def eat(context: typer.Context, basket: Basket, fruit: Fruit, output: Output) -> None:
        seen.extend([fruit, output, options_text(context), basket])

    one = typer.Typer()
    one.command()(typer_command(eat))
    result = CliRunner().invoke(one, arguments)
    return result.exit_code, seen or result.output


def test_a_field_is_an_option() -> None:
    code, (fruit, output, text, basket) = run(
        "x", "--weight", "0.50", "--peeled", "--shares", "a=1", "--shares", "b=2.5", "--colour", "7"
    )
    assert code == 0
    assert basket == Basket(7)
    assert fruit == Fruit("x", weight=Decimal("0.5"), peeled=True, shares={"a": 1.0, "b": 2.5})
    assert output == Output()
    assert "weight: '0.5'" in text
    assert "shares:\n- a=1\n- b=2.5" in text
    assert "secret" not in text


def test_defaults_of_the_field_are_those_of_the_command() -> None:
    assert run("x")[1][0] == Fruit("x")
    code, help_text = run("--help")
    assert code == 0
    assert help_text.index("--peeled") < help_text.index("--worms") < help_text.index("--kind")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--kind", "peer"], "unknown kind 'peer', did you mean 'pear'?"),
        (["x", "--kind", "pear", "--worms", "2"], "--worms has no effect with --kind pear"),
        (["x", "--weight", "much"], "'much' is not a number"),
        (["x", "--weight", "0", "--peeled"], "nothing to peel"),
        (["x", "--shares", "a=-1"], "--shares a=-1: a number above 0 is needed"),
    ],
)
def test_mistakes_are_errors_of_usage(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())


def test_an_option_without_effect_gets_its_neutral_value() -> None:
    assert as_read(Fruit("x", kind="pear", worms=3)).worms == -1
    assert as_read(Fruit("x", worms=3)).worms == 3
    recipe = UpcycleRecipe(method="noise", noise_std=Decimal("0.1")).settled(num_donors=2)
    assert [recipe.drop_ratio, recipe.noise_scale, recipe.num_donors] == [0, 0, 2]
    assert UpcycleRecipe(method="drop").settled(1).noise_ratio == 0


def test_a_run_from_before_an_option_has_its_default() -> None:
    now = TrainConfig(Path("m"), Path("o"), {}, max_steps=1).resolve(128, {}, gpu=False).identity("m", {})
    before = {name: value for name, value in now.items() if name not in ("moments", "master-weights")}
    assert differences(before, now) == []
    assert differences(before, now | {"moments": "8bit"}) == ["--moments (fp32 before, 8bit now)"]


def test_every_option_of_training_is_declared() -> None:
    assert set(options(TrainConfig)) == {field.name for field in dataclasses.fields(TrainConfig)}
    names = {parameter.name for parameter in typer.main.get_command(app).commands["cpt"].params}  # type: ignore[attr-defined]
    assert names == set(options(TrainConfig)) | set(options(Output))


def test_no_command_function_is_longer_than_60_lines() -> None:
    names = {command.__name__ for command in COMMANDS.values()}
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for path in COMMANDS_FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name in names
    }
    assert set(lengths) == names
    assert {name: length for name, length in lengths.items() if length > 60} == {}
