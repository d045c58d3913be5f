"""The matrices of a source, and where each goes: experts one by one, or all of a layer in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from moetool.arch.moe_source import expert_part, layers_of
from moetool.arch.spec import ArchSpec
from moetool.checkpoint.header import TensorInfo
from moetool.errors import CheckpointError, ConfigError
from moetool.recipe import PROJECTIONS
from moetool.surgery.fill import Place, as_matrix


@dataclass(frozen=True)
class Matrix:
    """A tensor of the source, or one expert's part of it.

    Attributes:
        info: where it lies, with its leading dimensions folded into rows.
        place: in the result.
        whole: the shape of the tensor that it goes to.
    """

    info: TensorInfo
    place: Place
    whole: tuple[int, ...]


def as_they_are(tensors: Mapping[str, TensorInfo]) -> dict[str, Matrix]:
    """Each tensor of a source as one matrix, by name."""
    return {name: Matrix(as_matrix(info), Place(name), info.shape) for name, info in tensors.items()}


def layout_of(names: Iterable[str], spec: ArchSpec | None) -> str | None:
    """`fused` or `per-expert`; None where the model has no experts, or of an unknown family."""
    if spec is None:
        return None
    names = set(names)
    for layer in layers_of(names):
        if spec.together.experts["down"].format(layer=layer) in names:
            return "fused"
        if not spec.fused and spec.experts["down"].format(layer=layer, expert=0) in names:
            return "per-expert"
    return None


def check_layout(layout: str, spec: ArchSpec | None, model_type: str) -> None:
    """Refuse a layout in which transformers 5 does not read a family.

    Raises:
        ConfigError: says why.
    """
    if spec is None:
        raise ConfigError(
            f"--layout {layout}: moetool does not know how a {model_type} stores experts; leave --layout out"
        )
    if layout == "per-expert" and spec.fused:
        raise ConfigError(
            f"--layout per-expert: transformers 5 reads the experts of a {model_type} from one tensor per layer only;"
            " leave --layout out"
        )


def split_experts(matrices: Mapping[str, Matrix], spec: ArchSpec, num_experts: int) -> dict[str, Matrix]:
    """Each expert's matrices out of the tensors that hold all of a layer."""
    split = dict(matrices)
    for layer in _layers(matrices, spec, "fused"):
        _rename_routers(split, spec.together, spec, layer)
        for projection, template in spec.together.experts.items():
            name = template.format(layer=layer)
            info, whole = matrices[name].info, matrices[name].whole
            together = 1 if projection == "down" else 2
            if len(whole) != 3 or whole[0] != num_experts or whole[1] % together:
                raise CheckpointError(f"tensor {name} has shape {list(whole)}, config.json says {num_experts} experts")
            split.pop(name, None)
            for expert in range(num_experts):
                own = spec.experts[projection].format(layer=layer, expert=expert)
                part = expert_part(info, spec.together.experts, projection, expert, num_experts)
                split[own] = Matrix(part, Place(own), part.shape)
    return split


def join_experts(matrices: Mapping[str, Matrix], spec: ArchSpec, num_experts: int) -> dict[str, Matrix]:
    """The same matrices, those of experts side by side in one tensor per layer: gate above up, and down."""
    joined = dict(matrices)
    for layer in _layers(matrices, spec, "per-expert"):
        _rename_routers(joined, spec, spec.together, layer)
        for projection in PROJECTIONS:
            own = [spec.experts[projection].format(layer=layer, expert=expert) for expert in range(num_experts)]
            missing = [name for name in own if name not in matrices]
            shapes = {matrices[name].info.shape for name in own if name in matrices}
            if missing or len(shapes) != 1:
                what = f"tensor {missing[0]} is missing" if missing else f"the shapes of {own[0]} and others differ"
                raise CheckpointError(f"{what}; fetch the checkpoint again")
            rows, columns = shapes.pop()
            together = 1 if projection == "down" else 2
            for expert, name in enumerate(own):
                place = Place(*spec.together.expert_place(projection, layer, expert, rows * columns), expert)
                joined[name] = replace(matrices[name], place=place, whole=(num_experts, together * rows, columns))
    return joined


def _rename_routers(matrices: dict[str, Matrix], before: ArchSpec, after: ArchSpec, layer: int) -> None:
    """Give a layer's router and selection bias the names that go with the other layout of its experts."""
    for old, new in ((before.router, after.router), (before.selection_bias, after.selection_bias)):
        if old and new and old != new and (name := old.format(layer=layer)) in matrices:
            matrices[name] = replace(matrices[name], place=Place(new.format(layer=layer)))


def _layers(matrices: Mapping[str, Matrix], spec: ArchSpec, layout: str) -> list[int]:
    """The layers with experts in a layout."""
    named = spec.together if layout == "fused" else spec
    return [layer for layer in layers_of(matrices) if named.experts["down"].format(layer=layer, expert=0) in matrices]
