"""Tiny random models, a tokenizer and the real command line, for tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "A router sends each token to a few experts; the load should be balanced.",
    "Numbers such as 0, 1, 2, 3 and 42 are tokens too.",
]


def save_tokenizer(folder: Path, vocab_size: int = 300) -> None:
    """A byte-level BPE with `<|endoftext|>` (id 0) as its end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


SETTINGS: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}


def save_llama(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Llama (hidden 32, 2 layers, intermediate 64, vocabulary 300) with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = SETTINGS | {"tie_word_embeddings": False}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# A random dense model of each family that can be upcycled, with what is special in it switched on:
# biases, sliding windows, head sizes that are not hidden / heads, multipliers, tied embeddings.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},  # with head_dim 16 in the families that can have it
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "olmo2": {"rms_norm_eps": 1e-5},
    "ernie4_5": {"head_dim": 16},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": True,
    },
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.5},
    "hunyuan_v1_dense": {"head_dim": 16},
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,  # by default 256, to which each text is padded
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite_swa": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "layer_rope_theta": [0, 1000.0],
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "phi3": {"sliding_window": 8, "head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "cwm": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "internlm3": {"head_dim": 16},
    "iquestcoder": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "helium": {"head_dim": 8},
    "cohere": {"logit_scale": 0.5},
}


def save_dense(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random dense model of a family (hidden 32, 2 layers, intermediate 64, vocabulary 300); no tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = SETTINGS | {"pad_token_id": 0}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(settings | DENSE[family] | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases start equal, and would hide a mix-up
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float("norm" in name))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_mixtral(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Mixtral (4 experts, top-2) of the size of `save_llama`, with its tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = SETTINGS | {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    MixtralForCausalLM(MixtralConfig(**(settings | changes))).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_glm4_moe(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random GLM-4 MoE (a dense layer, then two of 4 experts, top-2, sigmoid, 1 shared) with its tokenizer."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    Glm4MoeForCausalLM(Glm4MoeConfig(**(settings | changes))).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """A LoRA adapter (rank 2, alpha 6) of the first query projection of `save_llama`, as peft saves it."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    random = {
        f"{Q_PROJ}.lora_A.weight": torch.randn(2, 32, generator=draw),
        f"{Q_PROJ}.lora_B.weight": torch.randn(32, 2, generator=draw),
    }
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(random if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def save_pickled(source: Path, folder: Path) -> Path:
    """A checkpoint whose weights are in pytorch_model.bin."""
    from safetensors.torch import load_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def save_jsonl(path: Path, documents: list[str] | None = None, repeat: int = 20) -> Path:
    """A JSONL file of documents under `text`."""
    lines = [json.dumps({"text": f"{i}. {text}"}) for i in range(repeat) for text in (documents or TEXT)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def forward(
    routes: Sequence[Any], counts_LE: torch.Tensor, step_counts_LE: torch.Tensor | None = None, sequences: int = 1
) -> Any:
    """What the balance losses read of a micro-batch's forward; by default of a step of one micro-batch."""
    from moetool.train.batches import MicroBatch
    from moetool.train.terms import Forward

    nothing = torch.empty(0, 0)
    step_counts_LE = counts_LE if step_counts_LE is None else step_counts_LE
    batch = MicroBatch(torch.empty(sequences, 0), torch.empty(sequences, 0), None)
    return Forward(batch, nothing, routes, counts_LE, step_counts_LE, nothing)


def cli(
    *arguments: object, env: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the real `moetool` in a process of its own, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"} | (env or {})
    command = [sys.executable, "-m", "moetool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def in_process(*arguments: object) -> tuple[int, str, str]:
    """Run `moetool` in this process (seconds faster); return exit code, stdout, stderr."""
    import contextlib
    import io

    from moetool.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def result(*arguments: object) -> dict[str, Any]:
    """The JSON of a command that rewrites a checkpoint, and proves it."""
    code, out, err = in_process(*arguments, "--json", "--verify", "full")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


def refusal(*arguments: object) -> str:
    """The one line with which a command fails; warnings before it do not count."""
    code, _, err = in_process(*arguments)
    assert code == 1, err
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1
    return lines[0]


def killed_while_writing(out: Path, *command: object) -> dict[str, int]:
    """Kill a command that rewrites a checkpoint; returns the files that are complete, with their inodes."""
    from tests import forked

    for attempt in range(20):
        shutil.rmtree(out, ignore_errors=True)
        running = forked.start(out.with_name(f"streams-{attempt}"), *command, before="tests.forked:rename_slowly:")
        forked.wait_until(lambda: len(list(out.glob("*.safetensors"))) >= 3, running)
        running.send(signal.SIGKILL)
        running.wait()
        if (out / "moetool.partial.json").exists():
            break
    noted = json.loads((out / "moetool.partial.json").read_text())["complete"]
    assert noted
    return {name: (out / name).stat().st_ino for name in noted}
