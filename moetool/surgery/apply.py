"""An operation, from its plan to a verified folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moetool.amounts import size
from moetool.checkpoint.folder import FolderLock
from moetool.checkpoint.step_folder import STATE
from moetool.checkpoint.writer import prepare
from moetool.errors import CheckpointError
from moetool.progress import Progress
from moetool.surgery.lineage import is_finished
from moetool.surgery.plan import Plan, free_disk
from moetool.surgery.sources import Sources
from moetool.surgery.verify import Proof, verify
from moetool.surgery.write import write


def write_out(
    plan: Plan,
    sources: Sources,
    out: Path,
    workers: int,
    files: Mapping[str, bytes],
    overwrite: bool,
    progress: Progress,
) -> bool:
    """Write a plan to a folder, unless it is there already, finished.

    Args:
        plan: what to write.
        sources: it was made from.
        out: the folder.
        workers: processes.
        files: small files to put beside the weights.
        overwrite: whether a checkpoint that is there goes first.
        progress: reports bytes read and blocks written.

    Returns:
        Whether it was there already.

    Raises:
        CheckpointError: OUT holds something else or is being written, the disk is too small, or a source
            cannot be read or has changed.
    """
    with FolderLock(out):
        if not overwrite and is_finished(plan, sources.readers, out, workers):
            return True
        prepare(out, plan.identity(), overwrite)
        left = [*out.glob("model*.safetensors*"), *(out / STATE).glob("*.safetensors*")]
        written = sum(path.stat().st_size for path in left)
        need, free = plan.num_bytes, free_disk(out) + written
        if need > free:
            raise CheckpointError(
                f"{out}: {size(need)} to write, {size(free)} free; free some space or choose another disk"
            )
        write(plan, sources.readers, out, sources.recorded_names, workers, files, progress)
    return False


def prove(plan: Plan, sources: Sources, out: Path, level: str, workers: int, progress: Progress) -> Proof:
    """Verify the folder that `write_out` has written, or found written.

    Raises:
        CheckpointError: something does not hold.
    """
    try:
        return verify(plan, sources.readers, out, level, workers, progress)
    except CheckpointError as error:
        raise CheckpointError(f"{out} failed verification: {error}; use --overwrite to write it again") from None
