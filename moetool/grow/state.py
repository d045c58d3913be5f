"""The training state of a step folder for a model with more experts: fp32 weights, and the moments of its optimizer.

Shapes: E experts before, N after, m = N / E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from moetool.arch.moe_source import MoESource
from moetool.checkpoint.header import TensorInfo
from moetool.checkpoint.shard import TensorLayout
from moetool.checkpoint.step_folder import OPTIMIZER, TrainingReader
from moetool.errors import CheckpointError
from moetool.grow.recipe import GrowRecipe
from moetool.surgery.experts import carried_whole, copies
from moetool.surgery.fill import Fill, Piece, Place

Biases = Callable[[TensorInfo, str, Sequence[int]], Mapping[str, list[Fill]]]


def grown_state(
    source: MoESource, experts: Mapping[int, Sequence[int]], recipe: GrowRecipe, biases: Biases
) -> tuple[list[Fill], dict[str, list[TensorLayout]]]:
    """Fills of the training state, and the tensors of each of its files; none where the source has no such state.

    What belongs to an expert (its matrices, its row of the router) goes to its copies. The number of updates, by which
    AdamW corrects its moments, stays: with moments that are not 0 and a number of 0, the first update would be too
    large by 1 / (1 - beta1) over the root of 1 / (1 - beta2).

    Args:
        source: of the experts.
        experts: layer -> the expert before of each expert after.
        recipe: settled.
        biases: fills of a selection bias that changes.

    Raises:
        CheckpointError: the state is of a model with other experts.
    """
    if not isinstance(source.reader, TrainingReader):
        return [], {}
    memory, fills, files = source.spec.in_memory, [], dict[str, list[TensorLayout]]()
    parts = {memory.router, *memory.experts.values()}
    of_experts = {part.format(layer=layer): layer for layer in source.layers for part in parts}
    bias = memory.selection_bias
    of_biases = {bias.format(layer=layer): layer for layer in source.layers} if bias else {}
    for file, tensors in source.reader.stored.items():
        for name, info in tensors.items():
            parameter, _, moment = name.rpartition("/") if file == OPTIMIZER else (name, "", "")
            place, chosen = f"{file}/{name}", experts.get(of_experts.get(parameter, -1))
            if parameter in of_biases:
                chosen = experts[of_biases[parameter]]
                _check(source, info, info.num_elements)
                changed = biases(info, place, chosen).get(place)
                made = changed or [*_rows(source, info, place, chosen, 1.0, 1.0)]
                layout = TensorLayout(place, made[0].dtype, (*info.shape[:-1], len(chosen)))
            elif chosen and info.shape:
                _check(source, info, info.shape[0])
                made = [*_rows(source, info, place, chosen, *_factors(recipe, source.num_experts, moment))]
                layout = TensorLayout(place, info.dtype, (len(chosen), *info.shape[1:]))
            else:
                whole, layout = carried_whole(place, info)
                made = [whole]
            fills += made
            files.setdefault(file, []).append(layout)
    return fills, files


def _factors(recipe: GrowRecipe, num_experts: int, moment: str) -> tuple[float, float]:
    """What a moment (nothing: a weight) of an old expert, and of a copy, is multiplied with.

    With `double-k`, all m copies get the same tokens with weights that are m times smaller: the gradient of each is
    exactly 1 / m of the one before, and its square 1 / m^2. A sleeping copy gets no gradient; with a mean of past ones
    it would go on moving for 1 / (1 - beta1) steps.
    """
    m = recipe.num_experts / num_experts
    if recipe.start == "double-k":
        return {"exp_avg": (1 / m, 1 / m), "exp_avg_sq": (1 / m**2, 1 / m**2)}.get(moment, (1.0, 1.0))
    return (1.0, 0.0 if recipe.start == "sleeping" and moment == "exp_avg" else 1.0)


def _rows(
    source: MoESource, info: TensorInfo, place: str, chosen: Sequence[int], old: float, copy: float
) -> Iterator[Fill]:
    """A tensor that has a part for each expert, with the factors of old experts and of copies."""
    E = source.num_experts
    length, size = info.num_elements // E, info.size // E
    columns = min(info.shape[-1], length)
    for before, those in copies(chosen).items():
        part = replace(info, shape=(length // columns, columns), start=info.start + before * size, size=size)
        apart = [([after for after in those if after < E], old), ([after for after in those if after >= E], copy)]
        for afters, factor in [(those, old)] if old == copy else apart:
            if afters:
                places = tuple(Place(place, after * length, after) for after in afters)
                kind = {1.0: "carried", 0.0: "constant"}.get(factor, "moved")
                pieces = () if kind == "constant" else (Piece(0, part),)
                yield Fill(kind, pieces, places, info.dtype, part.shape, factor=factor)


def _check(source: MoESource, info: TensorInfo, found: int) -> None:
    if found != source.num_experts:
        raise CheckpointError(
            f"{source.reader.folder / info.shard}: {info.name} has shape {list(info.shape)}, but the model has"
            f" {source.num_experts} experts; give a step folder as cpt wrote it"
        )
