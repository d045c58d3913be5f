"""Whether the moments that `upcycle --keep-optimizer` carries are those of the new model's gradients, and what they do.

    python -m tests.benchmarks.moments --text FILE [--seeds 3] [--steps 400] [--lr 3e-3] [--batches 100] [--json FILE]

A small Llama (2 layers, hidden 128, intermediate 128, vocabulary 1024) is trained on the text at a constant rate, 1024
tokens per step. Its last step folder becomes 8 experts, top-2, with moments.

Gradients: of the dense model and of copies, over the same batches of 1024 tokens. A number is the mean square of
experts' gradients (of a projection), or the part of their mean along the dense one, over what is carried: 1 is right.
First of all experts together; then, in brackets, the smallest, median and largest of an expert in a layer over what
would be carried for as many tokens as it gets. Means are those of different halves of the batches, so that noise does
not count. Then of units with --method noise, and of those beside them.

Losses: the first 20 steps of `moetool cpt` of the result, at the same constant rate, with carried moments, with a fresh
optimizer, and with one that warms up for 10 steps; of the dense model, with its own optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.precision import SEQ_LEN, save_dense

E, K, BATCH = 8, 2, 8
PLAIN = (
    "--document",
    "line",
    "--schedule",
    "constant",
    "--seq-len",
    SEQ_LEN,
    "--global-batch-size",
    BATCH,
)
LAYERS = 2


def moetool(*arguments: object) -> None:
    from tests import tiny

    code, _, err = tiny.in_process(*arguments, "--quiet")
    assert code == 0, err


@dataclass(frozen=True)
class Seen:
    """Of a model's gradients over batches: the mean of each half of them, the mean square, by parameter.

    Attributes:
        halves: means.
        squares: mean squares.
        load: of each layer, the share of tokens that go to each expert; it sums to top-k. 1 for a dense model.
    """

    halves: tuple[dict[str, Any], dict[str, Any]]
    squares: dict[str, Any]
    load: list[Any]


def see(folder: Path, batches: Sequence[Any]) -> Seen:
    import torch

    from moetool.checkpoint.model import load_model
    from moetool.routing.capture import RouterCapture, has_routers

    model = load_model(folder, "float32")
    capture = RouterCapture(model) if has_routers(model) else None
    sums: list[dict[str, Any]] = [{}, {}, {}]
    counts = [torch.zeros(E) for _ in range(LAYERS)]
    for number, batch in enumerate(batches):
        model.zero_grad()
        collecting: Any = capture.collect() if capture else nullcontext([])
        with collecting as routes:
            model(batch, labels=batch).loss.backward()
        for layer, route in enumerate(routes):
            counts[layer] += route.indices_TK.flatten().bincount(minlength=E) / batch.numel() / len(batches)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            wide = parameter.grad.double()
            sums[number % 2][name] = sums[number % 2].get(name, 0) + wide * 2 / len(batches)
            sums[2][name] = sums[2].get(name, 0) + wide.square() / len(batches)
    return Seen((sums[0], sums[1]), sums[2], counts)


def parts(found: dict[str, Any], layer: int, projection: str) -> Any:
    """A projection of a dense FFN, or of all experts: (..., units, hidden)."""
    prefix = f"model.layers.{layer}.mlp"
    if f"{prefix}.gate_proj.weight" in found:
        matrix = found[f"{prefix}.{projection}_proj.weight"]
    elif projection == "down":
        matrix = found[f"{prefix}.experts.down_proj"]
    else:
        matrix = found[f"{prefix}.experts.gate_up_proj"].chunk(2, dim=1)[projection == "up"]
    return matrix.mT if projection == "down" else matrix


def against_rule(
    dense: Seen, moe: Seen, group: int, top_k: int, units: Any = None
) -> dict[str, dict[str, list[float]]]:
    """What was measured over what is carried: (of all experts together, then the smallest, median and largest of those
    experts that get at least a tenth of their share of tokens, for as many tokens as they get)."""
    found: dict[str, dict[str, list[float]]] = {"square": {}, "mean": {}}
    for projection in ("gate", "up", "down"):
        together: dict[str, list[float]] = {"square": [], "mean": []}
        apart: dict[str, list[float]] = {"square": [], "mean": []}
        c = group / (group if projection == "down" else 1)  # down carries the factor
        for layer in range(LAYERS):
            d1, d2 = (parts(half, layer, projection) for half in dense.halves)
            m2, v, old = (parts(t, layer, projection) for t in (moe.halves[1], moe.squares, dense.squares))
            size = len(m2[0])
            for expert in range(E):
                part = slice(expert % group * size, (expert % group + 1) * size)
                chosen = units(layer, expert) if units else slice(None)
                a, b, m = d1[part][chosen], d2[part][chosen], m2[expert][chosen]
                ratios = {
                    "square": float(v[expert][chosen].sum() / old[part][chosen].sum()) * E * top_k / c**2,
                    "mean": float((m * a).sum() / (b * a).sum()) * E / c,
                }
                relative = float(moe.load[layer][expert]) * E / top_k
                for what, ratio in ratios.items():
                    together[what].append(ratio)
                    apart[what] += [ratio / relative] * (relative > 0.1)
        for what, values in apart.items():
            spread = [min(values), statistics.median(values), max(values)]
            found[what][projection] = [statistics.mean(together[what]), *spread]
    return found


def gradients(step: Path, folder: Path, text: Path, count: int) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from moetool.recipe import UpcycleRecipe
    from moetool.units import redrawn_units

    ids = torch.tensor(AutoTokenizer.from_pretrained(step)(text.read_text()[:2_000_000])["input_ids"])
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - SEQ_LEN, (count, BATCH), generator=draw)
    batches = [torch.stack([ids[start : start + SEQ_LEN] for start in row]) for row in starts.tolist()]
    dense, found = see(step, batches), {}
    size = ("--num-experts", E, "--verify", "none")
    moetool("upcycle", step, folder / "copy", *size, "--top-k", K, "--method", "copy")
    found["copies"] = against_rule(dense, see(folder / "copy", batches), 1, K)
    moetool("upcycle", step, folder / "fine", *size, "--top-k", 4, "--method", "copy", "--granularity", 2)
    found["groups of 2"] = against_rule(dense, see(folder / "fine", batches), 2, 4)
    moetool("upcycle", step, folder / "noise", *size, "--top-k", K, "--method", "noise")
    entry = json.loads((folder / "noise" / "moetool.json").read_text())["lineage"][-1]
    recipe = UpcycleRecipe.from_json(entry["recipe"])
    noisy = see(folder / "noise", batches)
    kept = {(n, e): torch.ones(128, dtype=torch.bool) for n in range(2) for e in range(E)}
    for (layer, expert), mask in kept.items():
        mask[redrawn_units(recipe, layer, expert, "gate", 128)] = False
    found["units with noise"] = against_rule(dense, noisy, 1, K, lambda n, e: ~kept[n, e])
    found["units beside them"] = against_rule(dense, noisy, 1, K, lambda n, e: kept[n, e])
    return found


def losses(step: Path, folder: Path, text: Path, seed: int, lr: float) -> dict[str, list[float]]:
    def run(model: Path, name: str, *more: object) -> list[float]:
        out = folder / name
        train = ("--train", f"t={text}", "--seed", 100 + seed, "--max-steps", 20, "--lr", lr)
        moetool("cpt", model, out, *train, *PLAIN, *more)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row] + [rows[-1]["val"]["t"]]

    found = {"dense, its own": run(step, "dense", "--warmup-steps", 0, "--keep-optimizer")}
    for method in ("copy", "drop"):
        moe = folder / method
        size = ("--num-experts", E, "--top-k", K, "--seed", seed)
        moetool("upcycle", step, moe, *size, "--method", method, "--keep-optimizer", "--overwrite", "--verify", "none")
        for name, more in {
            "carried": ("--warmup-steps", 0, "--keep-optimizer"),
            "fresh": ("--warmup-steps", 0),
            "fresh, warm-up": ("--warmup-steps", 10),
        }.items():
            found[f"{method}, {name}"] = run(moe, f"{method}-{name}", *more)
    return found


def main() -> None:
    """Print both tables."""
    import torch

    asked = argparse.ArgumentParser()
    asked.add_argument("--text", type=Path, required=True)
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--steps", type=int, default=400)
    asked.add_argument("--batches", type=int, default=100)
    asked.add_argument("--lr", type=float, default=3e-3)
    asked.add_argument("--json", type=Path)
    options = asked.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"gradients": {}, "losses": []}
    with tempfile.TemporaryDirectory() as place:
        save_dense(Path(place) / "dense", options.text)
        for seed in range(options.seeds):
            folder = Path(place) / str(seed)
            size = ("--max-steps", options.steps, "--seed", seed, "--lr", options.lr)
            moetool("cpt", Path(place) / "dense", folder / "run", "--train", f"t={options.text}", *size, *PLAIN)
            step = folder / "run" / "checkpoints" / f"step-{options.steps:06d}"
            if seed == 0:
                document["gradients"] = gradients(step, folder, options.text, options.batches)
                for start, kinds in document["gradients"].items():
                    for kind, ranges in kinds.items():
                        told = [
                            f"{p} {all_:.2f} ({low:.2f} {mid:.2f} {high:.2f})"
                            for p, (all_, low, mid, high) in ranges.items()
                        ]
                        print(f"{start:18} {kind:7}", "   ".join(told), flush=True)
            document["losses"].append(losses(step, folder, options.text, seed, options.lr))
            for name, values in document["losses"][-1].items():
                shown = " ".join(f"{values[n]:.3f}" for n in (0, 1, 2, 4, 9, 19))
                worst = max(values[:20])
                print(f"seed {seed} {name:22} steps 1 2 3 5 10 20: {shown}  largest {worst:.3f}  val {values[20]:.4f}",
                      flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
