"""`moetool convert --adapter` against peft's own merge."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.integration.test_convert import convert, fails, logits, same, weights


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    return pytest.importorskip("peft", reason="make puts peft into .venv/optional")


def save_adapter(peft: Any, base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter whose parts are all random, as after training."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(peft: Any, base: Path, adapter: Path, folder: Path) -> dict[str, Tensor]:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return weights(folder)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "every matrix": {"target_modules": ALL, "r": 16, "lora_alpha": 8},
    "rank-stabilised": {"target_modules": ALL, "r": 8, "lora_alpha": 32, "use_rslora": True},
    "patterns": {
        "target_modules": ALL, "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {r"layers\.0\..*_proj": 3, "down_proj": 1},
    },
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "r": 4, "lora_alpha": 4},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"], "r": 4},
    "some layers": {"target_modules": ["k_proj"], "layers_to_transform": [1], "r": 3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_merge_is_that_of_peft(name: str, dtype: torch.dtype, peft: Any, tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", dtype=dtype)
    adapter = save_adapter(peft, base, tmp_path / "adapter", **SETTINGS[name])
    document = convert(base, tmp_path / "ours", "--adapter", adapter, "--workers", 2)
    assert document["adapter"]["merged"] == sum("lora_A" in n or "embedding_A" in n for n in weights(adapter))
    ours, theirs = weights(tmp_path / "ours"), merged_by_peft(peft, base, adapter, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    before = weights(base)
    assert sum(not torch.equal(before[n], ours[n]) for n in ours) >= document["adapter"]["merged"]
    # Each rounds once, after summing in its own order; peft rounds what it adds to embeddings before it adds it.
    bits = 2**-22 if dtype is torch.float32 else 2**-7
    for n in ours:
        assert ours[n].dtype == dtype
        largest = float(before[n].float().abs().max() + (ours[n].float() - before[n].float()).abs().max())
        assert float((ours[n].float() - theirs[n].float()).abs().max()) <= bits * largest
        if dtype is torch.bfloat16 and "embed" not in n:
            assert float((ours[n] != theirs[n]).float().mean()) < 0.01
    assert tiny.in_process("verify", tmp_path / "ours")[0] == 0
    out = tiny.in_process("inspect", tmp_path / "ours")[1]
    assert f"with {adapter} merged".replace(" ", "") in "".join(out.split())


def test_a_merge_in_blocks_into_another_dtype_and_a_fused_layout(
    peft: Any, mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetool.surgery.fill.BLOCK_ELEMENTS", 200)
    adapter = save_adapter(peft, mixtral, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], r=4)
    options = ("--adapter", adapter, "--dtype", "bf16", "--layout", "fused", "--max-shard-size", "50KB")
    convert(mixtral, tmp_path / "ours", *options)
    theirs = merged_by_peft(peft, mixtral, adapter, tmp_path / "theirs")
    ours = weights(tmp_path / "ours")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert (ours[name] != theirs[name].bfloat16()).float().mean() < 1e-3
    monkeypatch.undo()  # the proof does not depend on the size of blocks, nor the bits on its order
    assert tiny.in_process("verify", tmp_path / "ours", "--level", "quick")[0] == 0


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "embeddings": ({"target_modules": ["embed_tokens"]}, True),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, True),
    "both": ({"target_modules": ["lm_head", "embed_tokens"]}, True),
    "whole embeddings": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "whole head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "kept tied": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, False),
    "neither": ({"target_modules": ["q_proj"]}, False),
}


@pytest.mark.parametrize("name", TIED)
def test_a_merge_into_tied_embeddings_is_the_model_that_was_trained(name: str, peft: Any, tmp_path: Path) -> None:
    settings, untied = TIED[name]
    base = tiny.save_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(peft, base, tmp_path / "adapter", r=4, **settings)
    trained = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():  # peft's own merge changes the one tensor for both, so it is another model
        wanted = trained(torch.arange(1, 25)[None]).logits
    assert convert(base, tmp_path / "ours", "--adapter", adapter)["adapter"]["untied"] is untied
    assert float((logits(tmp_path / "ours") - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert ("lm_head.weight" in weights(tmp_path / "ours")) is untied
    assert tiny.in_process("verify", tmp_path / "ours")[0] == 0


def test_one_tensor_that_was_saved_twice_stays_one(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", tie_word_embeddings=True)
    both = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    for number, other in enumerate((0.0, 1.0)):
        tensors = {name: torch.ones(300, 32) + other * (name == both[1]) for name in both}
        adapter = tiny.save_adapter(tmp_path / str(number), tensors)
        document = convert(base, tmp_path / f"a{number}", "--adapter", adapter)
        assert document["adapter"]["untied"] is bool(other)


def test_embeddings_that_may_be_the_head_are_refused_in_a_family_with_other_names(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=300, n_positions=64))
    base.save_pretrained(tmp_path / "base")
    embedding = {
        "base_model.model.transformer.wte.lora_embedding_A": torch.ones(2, 300),
        "base_model.model.transformer.wte.lora_embedding_B": torch.ones(32, 2),
    }
    for number, tensors in enumerate((embedding, {"base_model.model.lm_head.weight": torch.ones(300, 32)})):
        adapter = tiny.save_adapter(tmp_path / str(number), tensors)
        told = fails(tmp_path / "base", tmp_path / "a", "--adapter", adapter)
        assert "whether a gpt2 has one tensor for embeddings and output head" in told


def test_a_router_that_was_trained_as_a_whole_has_the_name_that_it_has_in_memory(mixtral: Path, tmp_path: Path) -> None:
    router = torch.randn(4, 32)
    named = {"base_model.model.model.layers.1.mlp.gate.weight": router}
    adapter = tiny.save_adapter(tmp_path / "adapter", named, modules_to_save=["gate"])
    for options in ((), ("--layout", "fused")):
        convert(mixtral, tmp_path / f"a{len(options)}", "--adapter", adapter, *options)
    assert torch.equal(weights(tmp_path / "a0")["model.layers.1.block_sparse_moe.gate.weight"], router)
    assert torch.equal(weights(tmp_path / "a2")["model.layers.1.mlp.gate.weight"], router)
    experts = {"base_model.model.model.layers.1.mlp.experts.down_proj": torch.randn(4, 32, 64)}
    adapter = tiny.save_adapter(tmp_path / "experts", experts, modules_to_save=["experts"])
    assert "convert --layout fused on it first" in fails(mixtral, tmp_path / "b", "--adapter", adapter)
    convert(tmp_path / "a2", tmp_path / "c", "--adapter", adapter)
    assert torch.equal(weights(tmp_path / "c")["model.layers.1.mlp.experts.down_proj"], *experts.values())


def test_patterns_are_about_the_names_that_modules_had_in_a_multimodal_model(llama: Path, tmp_path: Path) -> None:
    module = tiny.Q_PROJ.replace("model.model.", "model.model.language_model.")
    inside = module.removeprefix("base_model.model.")
    adapter = tiny.save_adapter(tmp_path / "adapter", parts(module), alpha_pattern={f"^{inside}": 1})
    convert(llama, tmp_path / "a", "--adapter", adapter)
    a, b = parts(module).values()
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = weights(llama)[name] + 1 / 2 * (b @ a)
    assert torch.allclose(weights(tmp_path / "a")[name], wanted, rtol=0, atol=1e-6)


Q = tiny.Q_PROJ


def parts(module: str = Q, rank: int = 2, inputs: int = 32, outputs: int = 32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize(("settings", "scaling"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_a_merge_by_hand(settings: dict[str, Any], scaling: float, llama: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", parts(), **settings)
    convert(llama, tmp_path / "a", "--adapter", adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = parts().values()
    wanted = weights(llama)[name].double() + scaling * (b.double() @ a.double())  # alpha / r, alpha / sqrt(r)
    assert torch.allclose(weights(tmp_path / "a")[name].double(), wanted, rtol=1e-6, atol=1e-6)
    turned = tiny.save_adapter(tmp_path / "turned", parts(), fan_in_fan_out=True)
    convert(llama, tmp_path / "b", "--adapter", turned)
    wanted = weights(llama)[name].double() + 3 * (b.double() @ a.double()).T
    assert torch.allclose(weights(tmp_path / "b")[name].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_same_adapter_in_a_pickle(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", parts())
    convert(llama, tmp_path / "a", "--adapter", adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "--unpickle" in fails(llama, tmp_path / "b", "--adapter", adapter)
    convert(llama, tmp_path / "b", "--adapter", adapter, "--unpickle")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (parts(), {"peft_type": "IA3"}, "only LORA can be merged"),
        (parts(), {"use_dora": True}, "use_dora cannot be merged here"),
        (parts(), {"target_parameters": ["experts.gate_up_proj"]}, "target_parameters cannot be merged here"),
        (parts(), {"init_lora_weights": "pissa"}, "changed the base before"),
        (parts(), {"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
        (parts(), {"alpha_pattern": {"(": 1}}, "is not valid"),
        (parts(Q.replace("layers.0", "layers.7")), {}, "which {base} does not have"),
        (parts(inputs=16), {}, "which has shape [32, 32]"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 32)}, {}, "has only part of the LoRA"),
        (parts() | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, {}, "cannot be merged here"),
        ({"base_model.model.lm_head.weight": torch.ones(301, 32)}, {}, "the base has [300, 32]"),
        (parts() | {f"{Q}.lora_A.weight": torch.full((2, 32), float("nan"))}, {}, "holds NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_cannot_be_merged_is_one_line(
    tensors: dict[str, Tensor], settings: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", tensors, **settings)
    assert message.format(base=llama) in fails(llama, tmp_path / "a", "--adapter", adapter)
    assert not (tmp_path / "a").exists()


def test_an_adapter_is_no_model(llama: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tmp_path / "adapter", parts())
    for command in ("convert", "upcycle"):
        code, _, err = tiny.in_process(command, adapter, tmp_path / "a")
        assert code == 1
        assert f"moetool convert BASE OUT --adapter {adapter}" in err
    shutil.rmtree(adapter)
    assert "no folder" in fails(llama, tmp_path / "a", "--adapter", adapter)
    assert "is not an adapter; give a folder" in fails(llama, tmp_path / "a", "--adapter", llama)
