"""Peak memory and time of `moetool prune` with the whole model in memory, and with one layer of it (`--stream`).

    python -m tests.benchmarks.stream_memory [--sizes 0.1B 0.4B 1B] [--rounds 3] [--tokens 1024] [--folder DIR]

Random Qwen3-MoE models in fp32 with 16 experts, of which a token goes to 2. Each size has few wide layers or many
narrow ones. A round runs each side once, in turn and in a process of its own, without kept calibrations. Peak memory
is that of the process (VmHWM), with the libraries; files that it maps count as long as they are mapped. Time is the
processor's, which other processes of the machine change less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Layers and hidden size; experts have as many units as the model's width, so a layer has 48 times its square and more.
SIZES = {
    "0.1B": {"few": (4, 640), "many": (24, 256)},
    "0.4B": {"few": (4, 1344), "many": (24, 576)},
    "1B": {"few": (4, 2176), "many": (24, 896)},
}
VOCABULARY, EXPERTS = 8192, 16


def save(folder: Path, layers: int, hidden: int) -> int:
    """A random model with a tokenizer; returns its parameters."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests import tiny

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, moe_intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, num_experts=EXPERTS,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return int(model.num_parameters())


def measured(model: Path, text: Path, tokens: int, folder: Path, more: list[str]) -> tuple[float, int]:
    """Processor seconds and peak bytes of one pruning."""
    out, cache = folder / "out", folder / "cache"
    for place in (out, cache):
        shutil.rmtree(place, ignore_errors=True)
    command = [sys.executable, "-m", "moetool", "prune", str(model), str(out), "--keep-experts", "12"]
    command += ["--data", f"text={text}", "--max-tokens", str(tokens), "--seq-len", "256"]
    command += ["--score", "weighted-ean", "--verify", "none", "--workers", "1", "--json", *more]
    process = subprocess.Popen(command, env=os.environ | {"MOETOOL_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def compare(name: str, kind: str, folder: Path, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one model, in turn: medians."""
    layers, hidden = SIZES[name][kind]
    model = folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    # In a process of its own, so that this one stays small beside those that are measured.
    made = "from pathlib import Path; from tests.benchmarks.stream_memory import save;"
    made += f" print(save(Path({str(model)!r}), {layers}, {hidden}))"
    answer = subprocess.run([sys.executable, "-c", made], check=True, capture_output=True, text=True)
    sides: dict[str, list[tuple[float, int]]] = {"whole": [], "stream": []}
    for _ in range(arguments.rounds):
        for side, more in (("whole", []), ("stream", ["--stream"])):
            sides[side].append(measured(model, text, arguments.tokens, folder, more))
    row: dict[str, Any] = {"parameters": int(answer.stdout), "layers": layers, "hidden": hidden}
    for side, runs in sides.items():
        row |= {f"{side} seconds": statistics.median(seconds for seconds, _ in runs)}
        row |= {f"{side} bytes": statistics.median(peak for _, peak in runs)}
    return row


def main() -> None:
    """Print a line per model as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="for models and results; a temporary one by default")
    arguments = parser.parse_args()
    print("| parameters | layers | hidden | whole | `--stream` | time whole | time `--stream` |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        text = folder / "text.txt"
        text.write_text("\n\n".join(f"{i}. The router sends token {i * i} to two experts." for i in range(4000)))
        for name in arguments.sizes:
            for kind in SIZES[name]:
                row = compare(name, kind, folder, text, arguments)
                memory = [f"{row[f'{side} bytes'] / 1e9:.2f} GB" for side in ("whole", "stream")]
                seconds = [f"{row[f'{side} seconds']:.0f} s" for side in ("whole", "stream")]
                cells = [f"{row['parameters'] / 1e9:.2f} B", row["layers"], row["hidden"], *memory, *seconds]
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
