"""The folders of `upcycle_speed`: random Llamas to upcycle, and a look at what came of them.

    python -m tests.benchmarks.upcycle_folders write FOLDER SIZE
    python -m tests.benchmarks.upcycle_folders check FOLDER SOURCE

A process of its own for each, so that what it loads does not count as memory of the process that measures.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Letters in the shapes below: E experts, F intermediate, D hidden.
SIZES = {
    # 0.44 B parameters.
    "small": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    # As many layers as the largest models, all narrow: shows what a tensor costs in memory. 0.39 B parameters.
    "deep": {
        "vocab_size": 32000,
        "hidden_size": 256,
        "intermediate_size": 4096,
        "num_hidden_layers": 112,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # Layers of an 8 B model under embeddings of 2.21 GB: 1.98 B parameters.
    "large": {
        "vocab_size": 270000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}
BLOCK = 2**24  # entries of the random block that fills every tensor, piece by piece


def write(folder: Path, settings: Mapping[str, Any]) -> None:
    """A Llama in one bf16 file, streamed: no tensor is ever whole in memory."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    # mergekit-moe refuses a model without a tokenizer.
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    header, end = {}, 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 2 * tensor.numel()],
        }
        end += 2 * tensor.numel()
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    # An odd number of entries, so that it never falls on two rows of one matrix alike.
    random = torch.randn(BLOCK + 7919, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    stream = random.view(torch.uint8).numpy().data
    place = 0
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while place < end:
            start = place % len(stream)
            place += file.write(stream[start : start + min(end - place, len(stream) - start)])


def units_kept(folder: Path, source: Path) -> float:
    """The least share, over the experts of the first layer, of gate rows that are rows of the dense model's.

    1 for a copy, 1 - ratio where units are redrawn, 0 where an expert was left as it was initialised.
    """
    import torch
    from safetensors import safe_open

    def rows(matrix: torch.Tensor) -> set[bytes]:
        return {row.tobytes() for row in matrix.contiguous().view(torch.uint8).numpy()}

    with safe_open(source / "model.safetensors", framework="pt") as dense:
        known = rows(dense.get_tensor("model.layers.0.mlp.gate_proj.weight"))
    shares = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as made:
            for name in made.keys():  # noqa: SIM118 - not a mapping
                if re.search(r"layers\.0\..*experts\.\d+\.(w1|gate_proj)\.weight$", name):
                    gates = made.get_tensor(name)[None]  # 1 F D
                elif re.search(r"layers\.0\..*experts\.gate_up_proj$", name):
                    gates = made.get_tensor(name).chunk(2, dim=1)[0]  # E F D
                else:
                    continue
                shares += [len(known & rows(gate)) / len(known) for gate in gates]
    return min(shares, default=0.0)


def check(folder: Path, source: Path) -> dict[str, object]:
    """What transformers says on loading the folder, and whether its experts hold the dense model's units."""
    import torch
    from transformers import AutoModelForCausalLM

    kept = units_kept(folder, source)
    _, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    return {"units": kept, "missing": len(info["missing_keys"]), "unexpected": len(info["unexpected_keys"])}


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), SIZES[sys.argv[3]])
    else:
        print(json.dumps(check(Path(sys.argv[2]), Path(sys.argv[3]))))
