"""The measurements on text that an upcycling's options need, made once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetool import __version__
from moetool.calibration.measure import read_texts
from moetool.calibration.store import cache_folder
from moetool.checkpoint.folder import write_file
from moetool.checkpoint.reader import CheckpointReader, content_fingerprint
from moetool.data.tokens import TokenStream
from moetool.errors import CheckpointError, DataError
from moetool.measured import Measured
from moetool.outside import fits, read_json
from moetool.progress import Progress
from moetool.recipe import CALIBRATE, FITTED, UpcycleRecipe
from moetool.upcycle.plan import Upcycling, plan_upcycling
from moetool.upcycle.router_pass import fit_routers
from moetool.upcycle.texts import TextOptions, reads_units
from moetool.upcycle.usage import measure_units

SAME_LOAD = 0.01  # loads of the same text on two machines differ less: near ties may go either way
FORMAT = 5  # of what is kept; raise it when what is measured changes


def measure(
    upcycling: Upcycling,
    readers: Sequence[CheckpointReader],
    run: TextOptions,
    clients: Sequence[str],
    progress: Progress,
    recorded: str = "",
) -> Upcycling:
    """The upcycling with the measurements that its options need.

    What was measured is kept in the cache: a run that was killed continues with the same numbers, and `--plan` and
    the run after it measure once.

    Args:
        upcycling: planned without.
        readers: its sources.
        run: the texts.
        clients: see `plan_upcycling`.
        progress: reports tokens.
        recorded: see `tokenized`.

    Raises:
        DataError: a text cannot be read, is too short, is not of the model's vocabulary, or is given for two donors.
        CheckpointError: the model does not run.
    """
    texts = read_texts(run.calibrate, readers[0].folder, run, progress, recorded)
    if upcycling.recipe.router == "ridge":
        _check_different(texts)
    texts_read = {
        "texts": _digests(texts),
        "max_tokens": run.max_tokens,
        "seq_len": run.seq_len,
    }
    parts = [FORMAT, __version__, [content_fingerprint(reader.folder) for reader in readers]]
    # The order of texts says which donor's each is; JSON's keys, sorted, do not have it.
    parts += [upcycling.plan.recipe, upcycling.plan.config, texts_read, [*texts], run.batch_size, run.device]
    parts += [upcycling.state is not None]  # then fp32 weights are read
    path = cache_folder() / f"{_sha256(parts)}.json"
    document = _kept(path)
    if document is None:
        measured = _measure(upcycling, readers, texts, run, progress)
        document = {"measured": measured.to_json(), "units_apart": measured.units_apart}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(document | {"sha256": _sha256(document)}).encode())
    found = replace(Measured.from_json(document["measured"], texts_read), units_apart=document["units_apart"])
    size, keep = upcycling.plan.max_shard_size, upcycling.state is not None
    return plan_upcycling(readers, upcycling.recipe, size, clients, found, keep)


def _kept(path: Path) -> Any:
    """Earlier measurements from the cache; None where they are absent or damaged."""
    with suppress(OSError, CheckpointError):
        document = read_json(path)
        if document.pop("sha256", None) == _sha256(document):
            return document
    return None


def _sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _digests(texts: Mapping[str, TokenStream]) -> dict[str, str]:
    return {name: text.manifest["sha256"] for name, text in texts.items()}


def _check_different(texts: Mapping[str, TokenStream]) -> None:
    """Refuse the same text for two donors, which nothing in it tells apart."""
    names: dict[str, str] = {}
    for name, text in texts.items():
        other = names.setdefault(text.manifest["sha256"], name)
        if other != name:
            raise DataError(
                f"--calibrate {name} is the same text as {other}, so --router ridge cannot tell their donors apart;"
                " give another text, or use balanced"
            )


def _measure(
    upcycling: Upcycling,
    readers: Sequence[CheckpointReader],
    texts: Mapping[str, TokenStream],
    run: TextOptions,
    progress: Progress,
) -> Measured:
    measured = upcycling.measured
    recipe = upcycling.recipe
    if reads_units(recipe):
        measured = measure_units(upcycling, [reader.folder for reader in readers], texts, run, progress)
        size, keep = upcycling.plan.max_shard_size, upcycling.state is not None
        upcycling = plan_upcycling(readers, recipe, size, measured=measured, keep_optimizer=keep)
    if recipe.router in FITTED:
        measured = fit_routers(upcycling, readers, texts, run, progress)
    return measured


def measure_again(
    readers: Sequence[CheckpointReader], entry: Mapping[str, Any], run: TextOptions, progress: Progress
) -> dict[str, Any]:
    """Fit the routers of a finished upcycling again, and compare the loads with those that its lineage records.

    Args:
        readers: its sources.
        entry: of the lineage.
        run: the same texts; how much of them is read is recorded.
        progress: reports tokens.

    Returns:
        The largest difference of a load.

    Raises:
        CheckpointError: nothing was fitted, a text is another one, or a load differs.
    """
    texts_read = entry.get("recipe", {}).get(CALIBRATE, {})
    recorded = Measured.from_json(entry.get("measured", {}), texts_read)
    readable = fits(texts_read, {"texts": {"*": str}, "max_tokens": int, "seq_len": (int, type(None))})
    if not recorded.loads or not readable or texts_read["max_tokens"] < 1 or (texts_read["seq_len"] or 2) < 2:
        raise CheckpointError("moetool.json records no router that was fitted on text; leave out --calibrate")
    run = replace(run, max_tokens=texts_read["max_tokens"], seq_len=texts_read["seq_len"])
    texts = read_texts(run.calibrate, readers[0].folder, run, progress)
    if _digests(texts) != texts_read["texts"]:
        texts = read_texts(run.calibrate, readers[0].folder, run, progress, whole=True)
    if _digests(texts) != texts_read["texts"]:
        raise CheckpointError(
            f"the texts of --calibrate are not those that the routers were fitted on: {', '.join(texts_read['texts'])}"
        )
    texts = {name: texts[name] for name in texts_read["texts"]}  # in the order of the donors, whatever was typed
    recipe, before = UpcycleRecipe.from_json(entry["recipe"]), replace(recorded, routers={}, loads={}, halves={})
    keep = entry.get("training_state") is True  # then fp32 weights were read
    upcycling = plan_upcycling(readers, recipe, entry["max_shard_size"], measured=before, keep_optimizer=keep)
    found = fit_routers(upcycling, readers, texts, run, progress)
    worst = 0.0
    for layer, loads in found.loads.items():
        for name, load in loads.items():
            known = recorded.loads.get(layer, {}).get(name, [])
            off = max(abs(a - b) for a, b in zip(load, known, strict=True)) if len(load) == len(known) else 1.0
            if off > SAME_LOAD:
                raise CheckpointError(
                    f"layer {layer}: a load on {name} is off by {off:.3f} from the one that moetool.json records"
                )
            worst = max(worst, off)
    return {"load_difference": worst}
