"""OUT.jsonl: absent or complete; made batch by batch in a hidden folder, from which a killed run continues.

`.OUT.jsonl.unfinished/` holds the text so far and `state.json`: what decides the text, and how much of it is done.
When all is done, state.json becomes OUT.jsonl.moetool.json beside the text. The lock is that of the hidden folder, so
several processes may write different files beside each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moetool import __version__
from moetool.checkpoint.folder import naming, remove, sync_folder, write_file, write_files
from moetool.errors import DataError, MoetoolError
from moetool.outside import fits, read_json
from moetool.sample.options import differences

FORMAT = "moetool-sample"


@dataclass(frozen=True)
class Done:
    """The progress so far.

    Attributes:
        num_batches: of samples.
        num_samples: drawn, of which some are empty.
        num_empty: of only white space, which are not written.
        num_ended: that the model has ended; the others are cut.
        num_tokens: generated, with the end-of-text tokens and those of empty samples.
        num_prompt_tokens: that prompts have, beside them.
        num_bytes: of the file.
    """

    num_batches: int = 0
    num_samples: int = 0
    num_empty: int = 0
    num_ended: int = 0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_bytes: int = 0

    def plus(self, **more: int) -> Done:
        """With so much more."""
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


def hidden(out: Path) -> Path:
    """The folder in which OUT.jsonl is made."""
    return out.parent / f".{out.name}.unfinished"


def beside(out: Path, name: str) -> Path:
    """A file about OUT.jsonl: its `moetool.yaml` or `moetool.json`."""
    return out.parent / f"{out.name}.{name}"


def finished(out: Path, identity: Mapping[str, Any]) -> Done | None:
    """The record of a finished OUT.jsonl; None if it does not exist.

    Raises:
        DataError: it holds anything else than what `identity` gives.
    """
    if not os.path.lexists(out):
        return None
    again = "give another OUT, or replace it with --overwrite"
    try:
        before, done = _read(beside(out, "moetool.json"))
    except MoetoolError:
        raise DataError(f"{out} exists already, and it is unknown how it was made; {again}") from None
    if changed := differences(before, identity):
        raise DataError(f"{out} was made with other options: {', '.join(changed)}; {again}")
    if not out.is_file() or out.stat().st_size != done.num_bytes:
        raise DataError(f"{out} has changed since it was made; {again}")
    return done


class Unfinished:
    """The hidden folder; the caller has locked it."""

    def __init__(self, out: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
        """Find what is done.

        Args:
            out: OUT.jsonl.
            identity: what decides the text.
            overwrite: begin again if the folder holds other text.

        Raises:
            DataError: it holds other text, or is damaged.
        """
        self.out, self.identity = out, dict(identity)
        self.text, self.state = hidden(out) / "text.jsonl", hidden(out) / "state.json"
        self.done = Done()
        if not self.state.exists():
            return
        again = "or begin again with --overwrite"
        try:
            before, done = _read(self.state)
            if changed := differences(before, identity):
                raise DataError(
                    f"{out} was begun with other options: {', '.join(changed)}; give the same, another OUT, {again}"
                )
            if not self.text.is_file() or self.text.stat().st_size < done.num_bytes:
                raise DataError(
                    f"{hidden(out)} is damaged: text.jsonl is shorter than it was; give another OUT, {again}"
                )
            self.done = done
        except MoetoolError:
            if not overwrite:
                raise

    @property
    def begun(self) -> bool:
        """Whether the folder holds text: none is left once OUT.jsonl is in place."""
        return self.text.exists()

    def add(self, samples: Iterable[Mapping[str, Any]], **more: int) -> None:
        """Write samples behind those that are done. After a kill, all of them are done or none.

        Args:
            samples: the objects of lines.
            more: what else is added to `done`.
        """
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples).encode()
        with naming(self.text), open(self.text, "r+b" if self.done.num_bytes else "wb") as file:
            file.truncate(self.done.num_bytes)  # what a killed run has begun
            file.seek(self.done.num_bytes)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.done = self.done.plus(num_bytes=len(lines), **more)
        write_file(self.state, self._document())

    def finish(self, options: str) -> None:
        """Put the text in its place, with the record of its options beside it.

        Args:
            options: the content of moetool.yaml.
        """
        files = {"moetool.yaml": options.encode(), "moetool.json": self._document()}
        write_files(self.out.parent, {beside(self.out, name).name: data for name, data in files.items()})
        with naming(self.out):
            os.replace(self.text, self.out)
        sync_folder(self.out.parent)

    def discard(self) -> None:
        """Remove the folder."""
        with suppress(FileNotFoundError):
            remove(hidden(self.out))

    def _document(self) -> bytes:
        document = {"format": FORMAT, "moetool": __version__, "identity": self.identity, "done": asdict(self.done)}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> tuple[dict[str, Any], Done]:
    """Identity and `done` of a state.

    Raises:
        DataError: it is absent or damaged.
    """
    document = read_json(path, DataError)
    done, identity = document.get("done"), document.get("identity")
    if document.get("format") != FORMAT or not isinstance(identity, dict) or not isinstance(done, dict):
        raise DataError(f"{path} is damaged; begin again with --overwrite")
    if done.keys() != asdict(Done()).keys() or not all(fits(value, int) and value >= 0 for value in done.values()):
        raise DataError(f"{path} is damaged; begin again with --overwrite")
    return identity, Done(**done)
