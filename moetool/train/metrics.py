"""metrics.jsonl: one JSON object a line, each step once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moetool.checkpoint.writer import write_file


class MetricsLog:
    """Appends rows to a file that is readable while the run goes on."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the rows up to `step`, those of the checkpoint that is resumed from; 0 keeps none."""
        self.path = path
        kept = [row for row in self.rows() if row["step"] <= step] if step and path.exists() else []
        write_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the system at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in order; a line that a kill cut short is left out."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    yield row


def summarize(log: MetricsLog, step_tokens: int) -> dict[str, Any]:
    """What a run's rows come to: last training loss, validation before and after, speed.

    Args:
        log: of the run.
        step_tokens: tokens of one step.

    Returns:
        `loss`, `val` {domain: {before, after}}, `seconds` (training steps alone), `tokens_per_second`.
    """
    loss, seconds, tokens = None, 0.0, 0
    val: dict[str, dict[str, float]] = {}
    for row in log.rows():
        if "loss" in row:
            loss = row["loss"]
            seconds += step_tokens / row["tokens_per_second"]
            tokens += step_tokens
        for name, value in row.get("val", {}).items():
            val.setdefault(name, {"before": value})["after"] = value
    return {"loss": loss, "val": val, "seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None}
