"""What the options of an upcycling ask of text, measured once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

from moetool import __version__
from moetool.calibration.measure import read_texts
from moetool.calibration.store import cache_folder
from moetool.checkpoint.folder import write_file
from moetool.checkpoint.reader import CheckpointReader, content_fingerprint
from moetool.data.tokens import TokenStream
from moetool.errors import CheckpointError
from moetool.measured import Measured
from moetool.outside import read_json
from moetool.progress import Progress
from moetool.upcycle.plan import Upcycling, plan_upcycling
from moetool.upcycle.texts import TextOptions
from moetool.upcycle.usage import measure_units, reads_units

FORMAT = 1  # of what is kept; raise it when what is measured changes


def measure(
    upcycling: Upcycling,
    readers: Sequence[CheckpointReader],
    run: TextOptions,
    clients: Sequence[str],
    progress: Progress,
) -> Upcycling:
    """The upcycling with what its options ask of text.

    What was measured is kept in the cache: a run that was killed continues with the same numbers, and `--plan` and
    the run after it measure once.

    Args:
        upcycling: planned without.
        readers: its sources.
        run: the texts.
        clients: see `plan_upcycling`.
        progress: reports tokens.

    Raises:
        DataError: a text cannot be read, is too short, or is not of the model's vocabulary.
        CheckpointError: the model does not run.
    """
    texts = read_texts(run.calibrate, readers[0].folder, run, progress)
    asked = {
        "texts": {name: text.manifest["sha256"] for name, text in texts.items()},
        "max_tokens": run.max_tokens,
        "seq_len": run.seq_len,
    }
    parts = [FORMAT, __version__, [content_fingerprint(reader.folder) for reader in readers]]
    parts += [upcycling.plan.recipe, upcycling.plan.config, asked, run.batch_size, run.device]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"{digest}.json"
    found: Measured | None = None
    with suppress(OSError, CheckpointError):  # absent, or damaged and made again
        found = Measured.from_json(read_json(path), asked)
    if found is None:
        found = Measured.from_json(_measure(upcycling, readers, texts, run, progress).to_json(), asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found.to_json()).encode())
    return plan_upcycling(readers, upcycling.recipe, upcycling.plan.max_shard_size, clients, found)


def _measure(
    upcycling: Upcycling,
    readers: Sequence[CheckpointReader],
    texts: Mapping[str, TokenStream],
    run: TextOptions,
    progress: Progress,
) -> Measured:
    measured = upcycling.measured
    if reads_units(upcycling.recipe):
        folders = [reader.folder for reader in readers]
        measured = measure_units(upcycling, folders, texts, run, progress)
    return measured
