"""The training state of a dense model's step folder, converted for its Mixture of Experts.

Shapes: E routed experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetool.arch.dense import DenseSpec
from moetool.arch.forms import dense_tensors
from moetool.arch.spec import ArchSpec, scales
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.reader import CheckpointReader
from moetool.checkpoint.shard import TensorLayout
from moetool.checkpoint.step_folder import MASTER, OPTIMIZER, TrainingReader
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import UpcycleRecipe
from moetool.surgery.fill import Fill, Piece, Place
from moetool.upcycle.layout import fills_of, with_head

Tensors = Mapping[str, TensorInfo]
POWERS = {"exp_avg": 1, "exp_avg_sq": 2}  # AdamW's moments: means of powers of the gradient


@dataclass(frozen=True)
class DenseState:
    """The training state beside a dense model's weights, under the names of its family.

    Attributes:
        reader: of the step folder.
        weights: fp32 weights; empty where the checkpoint has all there is.
        moments: `exp_avg` and `exp_avg_sq` -> of each tensor.
        step: the number of updates that the moments have seen.
    """

    reader: TrainingReader
    weights: Tensors
    moments: Mapping[str, Tensors]
    step: TensorInfo

    @property
    def rounded(self) -> bool:
        """Whether some moment was not kept in fp32."""
        return any(info.dtype != "F32" for one in self.moments.values() for info in one.values())

    def exact(self, fills: Sequence[Fill], tensors: Tensors) -> list[Fill]:
        """Fills that read fp32 weights instead of the rounded ones, if there are some."""
        of = {Piece(0, tensors[name]): Piece(0, info) for name, info in self.weights.items()}
        return [replace(fill, sources=tuple(of.get(piece, piece) for piece in fill.sources)) for fill in fills]


def dense_state(
    readers: Sequence[CheckpointReader], dense_spec: DenseSpec, dense: Mapping[str, Any], tensors: Tensors
) -> DenseState:
    """The training state of DENSE, checked against its weights.

    Args:
        readers: of DENSE alone.
        dense_spec: its family.
        dense: the filled dense config.
        tensors: its checked weights.

    Raises:
        ConfigError: there is none, it is in blocks of 8 bits, or there are donors.
        CheckpointError: it is damaged, of another model, or of another optimizer than AdamW.
    """
    reader = readers[0]
    if len(readers) > 1:
        raise ConfigError(
            "--keep-optimizer: the moments of another model's training say nothing about the gradients of a donor's"
            " experts or of a mean; leave out --donor or --keep-optimizer"
        )
    if not isinstance(reader, TrainingReader) or reader.state is None:
        raise ConfigError(
            f"--keep-optimizer: {reader.folder} holds no optimizer state (training_state/); give a step folder of a run"
            " (OUT/checkpoints/step-NNNNNN), or leave the option out"
        )
    if reader.eight_bit:
        raise ConfigError(
            f"--keep-optimizer: the moments of {reader.folder} are blocks of 8 bits (cpt --moments 8bit), which may"
            " span units; leave the option out"
        )
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in reader.stored.get(OPTIMIZER, {}).items():
        parameter, _, moment = name.rpartition("/")
        found.setdefault(moment, {})[parameter] = info
    if set(found) != {*POWERS, "step"}:
        raise CheckpointError(
            f"{reader.folder / OPTIMIZER} holds {', '.join(sorted(found))[:100] or 'nothing'}, but AdamW has"
            f" {', '.join([*POWERS, 'step'])}; give a step folder as cpt wrote it"
        )
    steps = list(found["step"].values())
    if any(step.num_elements != 1 or not reader.same(step, steps[0]) for step in steps):
        raise CheckpointError(
            f"{reader.folder / OPTIMIZER}: not all tensors have had the same number of updates, but the matrices that"
            " become one tensor must have; give another step folder, or leave --keep-optimizer out"
        )
    masters = reader.stored.get(MASTER, {})
    named = [
        dense_tensors(one, reader.config, dense_spec, dense) for one in (masters, *(found[moment] for moment in POWERS))
    ]
    for one in named if masters else named[1:]:
        _check(reader, one, tensors)
    return DenseState(reader, named[0], dict(zip(POWERS, named[1:], strict=True)), steps[0])


def _check(reader: CheckpointReader, found: Tensors, tensors: Tensors) -> None:
    shapes = [{name: info.shape for name, info in one.items()} for one in (found, tensors)]
    differing = [name for name in sorted({*found, *tensors}) if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        has, wants = (list(of[differing[0]]) if differing[0] in of else "absent" for of in shapes)
        raise CheckpointError(
            f"{reader.folder}: {differing[0][:100]} is {has} in its training state, but {wants} in the model; give a"
            " step folder as cpt wrote it"
        )


def carried_state(
    state: DenseState,
    spec: ArchSpec,
    recipe: UpcycleRecipe,
    dense: Mapping[str, Any],
    moe: frozenset[int],
    tensors: Tensors,
    rounded: bool,
) -> tuple[list[Fill], dict[str, list[TensorLayout]]]:
    """Fills of the result's training state, and the tensors of each of its files; all in fp32.

    What comes from a dense tensor keeps the number of updates, by which AdamW corrects its moments. What is new (the
    router, say) has moments of 0 and a number of 0, as with a fresh optimizer.

    Args:
        state: of DENSE.
        spec: the family to write.
        recipe: settled.
        dense: the filled dense config.
        moe: the layers that are MoE.
        tensors: DENSE's weights.
        rounded: whether the result's own weights are not fp32.
    """
    spec, recipe = spec.in_memory, replace(recipe, dtype="F32")
    fills: list[Fill] = []
    files: dict[str, list[TensorLayout]] = {}

    def add(file: str, moment: str, made: tuple[list[Fill], list[TensorLayout]]) -> None:
        named = {layout.name: f"{file}/{layout.name}{moment}" for layout in made[1]}
        for fill in made[0]:
            places = tuple(replace(place, tensor=named[place.tensor]) for place in fill.places)
            fills.append(replace(fill, places=places))
        files.setdefault(file, []).extend(replace(layout, name=named[layout.name]) for layout in made[1])

    exact = state.weights or tensors
    if rounded and {info.dtype for info in exact.values()} == {"F32"}:
        made, layouts = fills_of([with_head(exact, spec)], spec, recipe, dense, moe)
        add(MASTER, "", _without_bias(made, layouts, spec, frozen=spec.selection_bias_is_matrix))
    for moment in POWERS:
        made, layouts = fills_of([with_head(state.moments[moment], spec)], spec, recipe, dense, moe)
        made, layouts = _without_bias(made, layouts, spec)
        add(OPTIMIZER, f"/{moment}", ([_moment(fill, moment, recipe, spec) for fill in made], layouts))
    add(OPTIMIZER, "/step", _steps(made, layouts, state.step))
    return fills, files


def _without_bias(
    fills: Sequence[Fill], layouts: Sequence[TensorLayout], spec: ArchSpec, frozen: bool = False
) -> tuple[list[Fill], list[TensorLayout]]:
    """Without the selection bias, which no gradient reaches; `frozen`: it is kept, because it is a parameter."""
    template = None if frozen else spec.selection_bias
    biases = {template.format(layer=fill.layer) for fill in fills} if template else set()
    kept = [fill for fill in fills if fill.places[0].tensor not in biases]
    return kept, [layout for layout in layouts if layout.name not in biases]


def _moment(fill: Fill, moment: str, recipe: UpcycleRecipe, spec: ArchSpec) -> Fill:
    """The fill of a weight's moment, from that of the weight whose sources are the moments of dense weights."""
    if fill.kind not in ("expert", "shared"):
        return fill if fill.sources else replace(fill, kind="constant", value=0.0)
    mean, square = gradient_shares(recipe, spec)[fill.kind]
    factor = mean / fill.factor if POWERS[moment] == 1 else square / fill.factor**2
    summed = fill.summed and POWERS[moment] == 2
    return replace(fill, kind=moment if fill.kind == "expert" else "shared", factor=factor, summed=summed)


def gradient_shares(recipe: UpcycleRecipe, spec: ArchSpec) -> dict[str, tuple[float, float]]:
    """The factors of the mean of a dense weight's gradient, and of its square, for a copy of it.

    The K experts of a token, of E, give c times the mean of their outputs, so an expert's output has the weight c / K
    on average where it is chosen, and the mean of its gradient is K / E times that: c / E. The square of a mean over
    tokens, whose own gradients are much larger than their mean, falls with the number of tokens (K / E of them) and
    with the square of the weight, to c^2 / (E K). Beside that, weights with a factor f have gradients of 1 / f.

    Args:
        recipe: settled.
        spec: the family.

    Returns:
        `expert` and `shared` -> (mean, square).
    """
    routed, shared = scales(recipe, spec)
    averaged = 0.5 if spec.shared and spec.shared.averaged and recipe.shared_experts else 1.0
    gate = 0.5 if spec.shared and spec.shared.gate else 1.0  # sigmoid(0)
    c, s = routed * averaged, shared * averaged * gate
    return {"expert": (c / recipe.num_experts, c**2 / (recipe.num_experts * recipe.top_k)), "shared": (s, s**2)}


def _steps(
    fills: Sequence[Fill], layouts: Sequence[TensorLayout], step: TensorInfo
) -> tuple[list[Fill], list[TensorLayout]]:
    """The number of updates of each tensor: that of DENSE, or 0 where nothing of it comes from DENSE."""
    carried = {place.tensor for fill in fills if fill.sources for place in fill.places}
    old = tuple(Place(layout.name) for layout in layouts if layout.name in carried)
    new = tuple(Place(layout.name) for layout in layouts if layout.name not in carried)
    made = [Fill("carried", (Piece(0, replace(step, shape=())),), old, "F32", ()), Fill("constant", (), new, "F32", ())]
    return [fill for fill in made if fill.places], [TensorLayout(layout.name, "F32", ()) for layout in layouts]
