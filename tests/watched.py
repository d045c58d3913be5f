"""A run's folder as `moetool cpt` leaves it while it trains, with numbers that a test knows."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = "co</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"
LAYERS, EXPERTS, TOP_K = ("1", "2", "3"), 8, 2


def row(step: int, domain: str = "code") -> dict[str, Any]:
    """The training row of a step."""
    draw = random.Random(step)
    loads = []
    for _ in LAYERS:
        shares = [0.5 + draw.random() for _ in range(EXPERTS)]
        loads.append([round(share / sum(shares), 5) for share in shares])
    entropy = [-sum(share * math.log(share) for share in load) / math.log(EXPERTS) for load in loads]
    return {
        "step": step,
        "loss": 2 + 2 * math.exp(-step / 50) + draw.gauss(0, 0.01),
        "lr": 1e-3 * min(1, step / 10),
        "grad_norm": 0.5 + draw.random() / 50,
        "balance": {"aux": 1 + draw.random() / 10},
        "num_tokens": step * 4096,
        "sources": {"code": step * 2500},
        "mri": [max(load) * TOP_K for load in loads],
        "entropy": entropy,
        "dead_experts": [[], [step % EXPERTS], []],
        "load": dict(zip(LAYERS, loads, strict=True)),
        "tokens_per_second": 10_000.0,
        "memory": 10**9 + step,
    }


def validation(step: int, domain: str = "code") -> dict[str, Any]:
    """The validation row of a step."""
    return {"step": step, "val": {domain: 3.5 - step / 100, "prose": 3 + step / 200}}


def save_run(out: Path, steps: int, total: int = 100, domain: str = "code") -> list[dict[str, Any]]:
    """A run that is at a step, on another machine; returns its rows."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [validation(0, domain)]
    for step in range(1, steps + 1):
        rows.append(row(step))
        if step % 4:
            rows[-1].pop("load") if step > 1 else None
        if step % 10 == 0:
            rows.append(validation(step, domain))
    options = {"train": {domain: "x"}, "replay": {"prose": "y"}, "max_steps": total, "schedule": "wsd"}
    options |= {"warmup_steps": 10, "cooldown_end": 0.7, "constant_end": 0.8}
    sources = {domain: {"tokens": 2500 * total, "epochs": 2.5}, "prose": {"tokens": 1596 * total, "epochs": 0.5}}
    partial = {"command": "cpt", "writer": {"process": 1, "host": "elsewhere"}, "options": options, "sources": sources}
    (out / "moetool.partial.json").write_text(json.dumps(partial))
    (out / "moetool.yaml").write_text(
        "# moetool cpt\nmodel: models/moe\nout: runs/a b\ntrain:\n- code=data/code.jsonl\nlr: '0.001'\n"
        "resume: 'false'\nweight-decay: '0.1'\n"
    )
    (out / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return rows
