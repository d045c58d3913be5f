"""Which mesh to use for two models on 8, 16 and 64 GPUs: computed from bytes and published bandwidths, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetool.budget.meshes import SPARE, Choice, Cluster, choices
from moetool.cost.devices import GPUS
from moetool.cost.parameters import sizes_of
from moetool.mesh import Mesh

SEQ_LEN, BATCH = 4096, 1024  # 4.2 M tokens a step
CARDS = {"H100, 80 GB": 80e9, "H200, 141 GB": 141e9}
CASES = (8, 16, 64)


def models() -> dict[str, Any]:
    """The two models, without weights."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    qwen = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936}
    qwen |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    qwen |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    configs = {
        "Llama-3.1-8B x 8": MixtralConfig(**llama, num_local_experts=8, num_experts_per_tok=2),
        "Qwen3-30B-A3B": Qwen3MoeConfig(**qwen),
    }
    with torch.device("meta"):
        return {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}


def fitting(found: Sequence[Choice], memory: float) -> Choice | None:
    """The first that fits a GPU."""
    return next((one for one in found if one.memory["total"] <= SPARE * memory), None)


def table() -> str:
    """The recommendations as Markdown, beside plain FSDP2."""
    lines = [
        "| model | GPUs | card | mesh | micro-batch | memory | GB sent per step | GB over the network | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models().items():
        for gpus in CASES:
            found = [
                one for one in choices(sizes_of(model), Cluster(GPUS["h200"], gpus), SEQ_LEN, BATCH) if one.mesh.sharded
            ]
            plain = [one for one in found if one.mesh == Mesh(gpus)]
            for card, memory in CARDS.items():
                start = f"| {name} | {gpus} | {card} |"
                for label, some in (("", found), (" (plain FSDP2)", plain)):
                    best = fitting(some, memory)
                    none = f"{'none fits' if some else 'refused: 8 experts'}{label} | | | | | |"
                    lines.append(f"{start} {_row(best, label) if best else none}")
    return "\n".join(lines)


def _row(one: Choice, label: str) -> str:
    mesh = one.mesh
    flags = {"--fsdp": mesh.fsdp, "--ep": mesh.ep, "--tp": mesh.tp, "--replicas": mesh.replicas}
    options = " ".join(f"{flag} {size}" for flag, size in flags.items() if size > 1)
    parts = ", ".join(f"{kind} {size / 1e9:,.0f}" for kind, size in one.sent.items() if size > 1e8)
    total = f"{sum(one.sent.values()) / 1e9:,.0f} ({parts})"
    cells = [f"`{options}`{label}", f"{one.training.micro_batch_size}", f"{one.memory['total'] / 1e9:.0f} GB", total]
    cells += [f"{one.crossing / 1e9:,.0f}", f"{one.alone:.0%} to {one.overlapped:.0%}"]
    return " | ".join(cells) + " |"
