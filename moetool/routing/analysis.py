"""The whole analysis of a checkpoint, alone or against another: load, measure, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moetool.checkpoint.model import free_models, load_model, load_tokenizer, pick_device, skeleton
from moetool.errors import CheckpointError, ConfigError
from moetool.layers import evenly, ranges
from moetool.mesh import check_model, distributed, mesh_of
from moetool.progress import Progress, silent
from moetool.routing import load_metrics
from moetool.routing.alignment import Alignment, line_up
from moetool.routing.capture import RouterCapture
from moetool.routing.comparison import MAY_DIFFER, RouteFile, build_comparison, check_shapes
from moetool.routing.drift import drift
from moetool.routing.origin import Origin, first_entry, read_origin
from moetool.routing.report import build_report
from moetool.routing.settings import Settings
from moetool.routing.shape import outline, probe
from moetool.routing.shown_text import ShownText
from moetool.routing.stats import RoutingStats
from moetool.routing.text_pass import Observer, Tokens, Windows, measure, window
from moetool.routing.unit_use import UnitUse
from moetool.routing.upcycling import build_upcycling
from moetool.routing.vocabulary import TokenCounts, continual_specialization, distinct_tokens, table_size

VOCABULARY_BYTES = 10**9  # what `--vocabulary-layers auto` may take


def analyze(
    model: tuple[str, Path],
    texts: Mapping[str, Tokens],
    settings: Settings,
    *,
    compare: tuple[str, Path] | None = None,
    scratch: Path | None = None,
    notice: Callable[[str], None] = lambda message: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the routing of a checkpoint on some texts; with `compare`, of another on the same tokens.

    One model is in memory at a time.

    Args:
        model: its name for the report and its folder.
        texts: domain -> tokens, of the tokenizer of both models.
        settings: how texts run, and what is measured.
        compare: name and folder of the second checkpoint.
        scratch: where a comparison keeps the first checkpoint's choices while it runs.
        notice: called with one line about memory or disk that is about to be used.
        progress: reports the tokens done.

    Returns:
        The report, as `build_report` makes it.

    Raises:
        CheckpointError: a model cannot be loaded, has no router that can be read, or its moetool.json
            is damaged or belongs to another checkpoint.
        ConfigError: the checkpoints differ in shape, or the settings do not fit the model.
    """
    origin = read_origin(model[1])
    alignment = _check_models([model, compare] if compare else [model], settings)
    if origin and any(origin.num_redrawn) and settings.unit_use and not mesh_of(settings).whole:
        raise ConfigError("--unit-use reads whole experts, which --fsdp, --ep and --tp divide; give --no-unit-use")
    loaded, capture = _open(model[1], settings)
    empty = probe(loaded, capture)
    windows = Windows(window(loaded, settings.seq_len), settings.batch_size, settings.max_tokens)
    shape = _shape(loaded, capture, empty)
    counted = _vocabulary_layers(settings, texts, empty, notice)
    tokens = TokenCounts(texts, settings.max_tokens, empty, counted) if counted else None
    routes = RouteFile(scratch or Path.cwd(), texts, settings.max_tokens, empty, alignment) if compare else None
    if routes:
        notice(f"the choices of {model[0]} take {routes.size / 1e6:.1f} MB of disk while the comparison runs")
    use = _unit_use(loaded, origin, settings)
    observers: list[Observer] = [
        observer for observer in (tokens and tokens.observe, routes and routes.write, use and use.observe) if observer
    ]
    shown = None
    if settings.show_text:
        outlines = [empty, *([_outline(compare[1], empty)] if compare else [])]
        shown = ShownText(texts, settings.max_tokens, outlines, alignment)
        observers.append(partial(shown.observe, 0))
    stats = measure(loaded, capture, texts, windows, observers=observers, progress=progress)
    del loaded, capture  # its memory is the next model's
    free_models()
    comparison = None
    if compare and routes:
        loaded, capture = _open(compare[1], settings)
        like = probe(loaded, capture)
        check_shapes(compare[0], shape, _comparable(_shape(loaded, capture, like), alignment))
        tokens_after = TokenCounts(texts, settings.max_tokens, like, counted, alignment) if counted else None
        same = read_origin(compare[1]) if origin and first_entry(compare[1]) == origin.entry else None
        use_after = _unit_use(loaded, same, settings)
        observers = [
            routes.compare,
            *([tokens_after.observe] if tokens_after else []),
            *([use_after.observe] if use_after else []),
            *([partial(shown.observe, 1)] if shown else []),
        ]
        after = measure(loaded, capture, texts, windows, observers=observers, progress=_named(progress, compare[0]))
        del loaded, capture
        free_models()
        continual = continual_specialization(tokens, tokens_after, alignment) if tokens and tokens_after else None
        drifted = drift(model[1], compare[1], (empty.num_experts, like.num_experts), progress, alignment)
        upcycling = build_upcycling(same, compare[1], use_after, _named(progress, compare[0]))
        comparison = build_comparison(compare[0], stats, after, routes, drifted, continual, upcycling)
    specialization = None
    if tokens:
        together = sum(stats.values(), start=empty)
        rows = [empty.layers.index(layer) for layer in tokens.layers]
        specialization = tokens.report(load_tokenizer(model[1]), load_metrics.load(together)[rows])
    return build_report(
        model[0],
        stats,
        vocabulary_specialization=specialization,
        comparison=comparison,
        upcycling=build_upcycling(origin, model[1], use, progress),
        text=shown.report(load_tokenizer(model[1])) if shown else None,
    )


def _check_models(models: list[tuple[str, Path]], settings: Settings) -> Alignment | None:
    """Refuse, before any weights are loaded, a dense model, and a MODEL2 of another shape than MODEL.

    Returns:
        How the experts of the two correspond, where not by their numbers.
    """
    shapes: list[dict[str, Any]] = []
    longest: list[int] = []
    outlines: list[RoutingStats | None] = []
    for name, folder in models:
        empty_model = skeleton(folder)
        check_model(mesh_of(settings), empty_model)
        try:
            capture = RouterCapture(empty_model)
        except CheckpointError as error:
            raise CheckpointError(f"--compare {name}: {error}" if shapes else str(error)) from None
        outlines.append(outline(empty_model, capture))
        shapes.append(_shape(empty_model, capture, outlines[-1]))
        longest.append(window(empty_model, settings.seq_len))
    name, alignment, (first, second) = models[-1][0], None, (outlines[0], outlines[-1])
    if len(models) > 1 and first and second and first.layers == second.layers:
        folders = models[0][1], models[1][1]
        alignment = line_up(folders, (first.num_experts, second.num_experts), first.layers)
    check_shapes(name, shapes[0], _comparable(shapes[-1], alignment))
    if longest[-1] < longest[0]:
        raise ConfigError(f"--seq-len {longest[0]}: {name} has only {longest[-1]} positions; give at most that")
    return alignment


def _outline(folder: Path, like: RoutingStats) -> RoutingStats:
    """The shape of a second model before it is loaded; where its routers do not tell, it is the first's."""
    empty_model = skeleton(folder)
    return outline(empty_model, RouterCapture(empty_model)) or like


def _comparable(shape: dict[str, Any], alignment: Alignment | None) -> dict[str, Any]:
    """The parts of a second model's shape that must equal the first's."""
    return {what: value for what, value in shape.items() if not (alignment and what in MAY_DIFFER)}


def _shape(model: Any, capture: RouterCapture, empty: RoutingStats | None) -> dict[str, Any]:
    """What two models must have in common, in words; None where it is not known."""
    return {
        "the layers with a router": ranges(capture.layers),
        "the number of experts": empty.num_experts if empty else None,
        "top-k": empty.top_k if empty else None,
        "the vocabulary": model.get_input_embeddings().num_embeddings,
    }


def _open(folder: Path, settings: Settings) -> tuple[Any, RouterCapture]:
    mesh = mesh_of(settings)
    device = None if settings.device_map or not mesh.whole else pick_device(settings.device)
    model = load_model(folder, settings.dtype, device, settings.device_map, distributed(mesh))
    return model, RouterCapture(model)


def _unit_use(model: Any, origin: Origin | None, settings: Settings) -> UnitUse | None:
    if not (origin and any(origin.num_redrawn) and settings.unit_use):
        return None
    return UnitUse(model, origin)


def _vocabulary_layers(
    settings: Settings, texts: Mapping[str, Tokens], empty: RoutingStats, notice: Callable[[str], None]
) -> list[int]:
    wanted, layers = settings.vocabulary_layers, empty.layers
    if not isinstance(wanted, str):
        if unknown := [layer for layer in wanted if layer not in layers]:
            raise ConfigError(
                f"--vocabulary-layers: layer {unknown[0]} has no router; layers with one are {ranges(layers)}"
            )
        layers = list(wanted)
    num_types = len(distinct_tokens(texts, settings.max_tokens)) if layers else 0
    # A comparison needs a second table; one budget for each.
    one = table_size(num_types, empty.num_experts, 1)
    if wanted == "auto" and one * len(layers) > VOCABULARY_BYTES:
        layers = evenly(layers, max(1, VOCABULARY_BYTES // one))
    if layers:
        notice(
            f"counting tokens by expert in {len(layers)} of {len(empty.layers)} layers takes"
            f" {one * len(layers) / 1e6:.1f} MB of memory (--vocabulary-layers chooses them)"
        )
    return layers


def _named(progress: Progress, model: str) -> Progress:
    def renamed(task: str, done: float, total: float, note: str = "") -> None:
        progress(f"{task} in {model}", done, total, note)

    return renamed
