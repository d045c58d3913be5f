"""Balance strategies at work: router gradients however a run is computed, real runs, what they save."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.checkpoint.model import load_model
from moetool.data.make_tokens import tokenized
from moetool.data.text import TextSource
from moetool.routing.capture import RouterCapture
from moetool.train import balance, state
from moetool.train.balance import build_strategies, build_terms, count_routes
from moetool.train.config import TrainConfig
from moetool.train.execution import apply_execution, executing
from moetool.train.loss import logits
from moetool.train.selection import selection_biases
from moetool.train.terms import Forward, Term
from tests import forked, tiny

SMALL = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3, "--json", "--quiet"]
LOSSES = ["aux", "global-aux", "pooled-aux", "seq-aux", "adaptive-aux", "z-loss", "erc"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {
        "mixtral": tiny.save_mixtral(folder / "mixtral"),
        "glm4_moe": tiny.save_glm4_moe(folder / "glm4_moe"),
    }


@pytest.fixture
def light_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces and differentiates, but generates no C++, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def cpt(model: Path, out: Path, text: Path, *more: object, steps: int = 4) -> tuple[int, str, str]:
    return tiny.in_process("cpt", model, out, "--train", f"new={text}", "--max-steps", steps, *SMALL, *more)


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of training, without their speed."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("step", "loss", "grad_norm", "balance", "mri")} for row in read]


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a result, whose files several processes may have written."""
    return {name: weight for file in folder.glob("model*.safetensors") for name, weight in load_file(file).items()}


def options(strategies: list[str]) -> list[str]:
    return [part for name in strategies for part in ("--balance", name)]


def router_gradients(model_folder: Path, strategies: list[str], **how: Any) -> list[Tensor]:
    """Of two micro-batches, as the loop adds them up, the balance losses weighing as much as language."""
    chosen = dict.fromkeys(balance.parse(strategies), 1.0)
    config = TrainConfig(model_folder, model_folder, {}, balance=chosen, **how)
    with executing(config):
        model: Any = load_model(model_folder, "float32")
        capture = RouterCapture(model)
        with torch.no_grad(), capture.collect():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))  # as the plan does
        at_work = build_strategies(config.balance, model, capture)
        terms = [*build_terms(config.balance).values(), *(s.term for s in at_work.values() if s.term)]
        apply_execution(config, model)
        model.train()
        seen: list[Tensor] = []
        for micro in range(2):
            tokens = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(micro))
            with capture.collect() as routes:
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            assert [route.layer for route in routes] == capture.layers
            seen.append(count_routes(routes))
            forward = tiny.forward(routes, seen[-1], torch.stack(seen).sum(dim=0), sequences=2)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            for term in terms:
                loss = loss + term.values(forward).mean()
            (loss / 2).backward()
            assert len(routes) == len(capture.layers)  # nothing was collected in the recomputation
        gradients = [router.weight.grad for router in capture.routers.values()]
    assert all(isinstance(gradient, Tensor) and gradient.abs().max() > 0 for gradient in gradients)
    return [gradient for gradient in gradients if isinstance(gradient, Tensor)]


CASES = [
    *((family, [name]) for family in ("mixtral", "glm4_moe") for name in [*LOSSES, "sinkhorn"]),
    ("glm4_moe", ["loss-free", "aux"]),
]


@pytest.mark.parametrize(("family", "strategies"), CASES)
def test_gradient_checkpointing_keeps_the_routers_gradient(
    models: dict[str, Path], family: str, strategies: list[str]
) -> None:
    plain = router_gradients(models[family], strategies)
    again = router_gradients(models[family], strategies, gradient_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    without = router_gradients(models[family], ["none"])
    assert not any(torch.allclose(a, b, rtol=1e-2) for a, b in zip(plain, without, strict=True))


def _compiled_gradient_is_the_same(folder: Path, strategies: list[str], **how: bool) -> None:
    plain, compiled = (router_gradients(folder, strategies, **more) for more in ({}, {"compile": True, **how}))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "strategies"), [("mixtral", [*LOSSES, "sinkhorn"]), ("glm4_moe", ["loss-free"])])
def test_compilation_keeps_the_routers_gradient(
    models: dict[str, Path], light_compiler: None, family: str, strategies: list[str]
) -> None:
    _compiled_gradient_is_the_same(models[family], strategies, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize(("family", "strategies"), CASES)
def test_compilation_keeps_the_routers_gradient_of_each_strategy(
    models: dict[str, Path], light_compiler: None, family: str, strategies: list[str], how: dict[str, bool]
) -> None:
    _compiled_gradient_is_the_same(models[family], strategies, **how)


STRATEGIES = [
    ("mixtral", ["global-aux", "z-loss"], "fp32"),
    ("mixtral", ["pooled-aux"], "fp32"),
    ("mixtral", ["sinkhorn", "z-loss"], "fp32"),
    ("mixtral", ["sinkhorn", "z-loss"], "bf16"),
    ("mixtral", ["none"], "fp32"),
    ("glm4_moe", ["aux", "global-aux", "pooled-aux", "z-loss"], "fp32"),
    ("glm4_moe", ["sinkhorn"], "fp32"),
    ("glm4_moe", ["loss-free=0.01"], "fp32"),
    ("glm4_moe", ["loss-free", "aux=0.001"], "bf16"),
    ("glm4_moe", ["adaptive-aux", "seq-aux", "erc", "loss-free"], "bf16"),
]


@pytest.mark.parametrize(("family", "strategies", "precision"), STRATEGIES)
def test_a_run_with_each_strategy_saves_the_stock_model_that_it_trained(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, family: str, strategies: list[str], precision: str
) -> None:
    out, val = tmp_path / "out", tiny.save_jsonl(tmp_path / "val.jsonl", ["Something else."], repeat=3)
    code, stdout, stderr = cpt(
        models[family], out, jsonl, *options(strategies), "--val", f"v={val}", "--precision", precision
    )
    assert (code, stderr) == (0, "")
    names = {name.partition("=")[0] for name in strategies} & set(LOSSES)
    for row in rows(out):
        if "loss" in row:
            assert set(row["balance"]) == names
            assert all(0.5 <= mri <= 1 for mri in row["mri"])
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "output_router_logits" not in json.loads((out / "config.json").read_text())
    assert weights(out).keys() == weights(models[family]).keys()
    # What was validated is what a stock model computes from the files.
    stream = _val_tokens(models[family], val)
    total = 0.0
    for start in range(0, len(stream) - 1, 16):
        window = torch.tensor([stream[start : start + 17]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=window[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    assert json.loads(stdout)["val"]["v"]["after"] == pytest.approx(
        total / (len(stream) - 1), rel=1e-4 if precision == "fp32" else 2e-2
    )


def _val_tokens(model: Path, val: Path) -> list[int]:
    stream = tokenized(TextSource(str(val)), model)
    return [int(token) for token in stream.read(0, stream.num_tokens)]


def test_strategies_balance_a_collapsed_router(tmp_path: Path, jsonl: Path) -> None:
    """Routers that send nearly all tokens to two of four experts use all of them again."""
    source = tiny.save_glm4_moe(tmp_path / "source")
    _collapse(source)
    before, after = {}, {}
    for name in ("none", "aux=1", "global-aux=1", "pooled-aux=1", "loss-free=0.1", "sinkhorn"):
        out = tmp_path / name.partition("=")[0]
        assert cpt(source, out, jsonl, "--balance", name, "--lr", 1e-2, "--val-fraction", 0, steps=15)[0] == 0
        mri = [sum(row["mri"]) / len(row["mri"]) for row in rows(out) if "mri" in row]
        before[name], after[name] = mri[0], min(mri)
    assert before["none"] > 0.9
    assert before["sinkhorn"] < 0.65  # from the first step; 1/2 is balance
    assert all(after[name] < after["none"] - 0.1 for name in after if name != "none"), after


def _collapse(folder: Path) -> None:
    """Make two experts of every layer win for most tokens, by the selection bias of a saved model."""
    from safetensors.torch import save_file

    tensors = weights(folder)
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name][2:] = tensors[name][:1].clone() * 0.999
            tensors[name][2:] -= 0.5 * tensors[name][:2].mean(dim=0)
        if name.endswith("e_score_correction_bias"):
            tensors[name][:2] = 0.3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_selection_bias_is_saved_in_float32(tmp_path: Path, jsonl: Path, dtype: torch.dtype) -> None:
    source, out = tiny.save_glm4_moe(tmp_path / "source", dtype=dtype), tmp_path / "out"
    assert cpt(source, out, jsonl, "--balance", "loss-free=0.0011")[0] == 0
    with safe_open(out / "model.safetensors", "pt") as file:
        biases = {name: file.get_tensor(name) for name in file.keys() if name.endswith("e_score_correction_bias")}  # noqa: SIM118
        assert file.get_tensor("model.layers.1.mlp.gate.weight").dtype == dtype
    assert len(biases) == 2
    for bias in biases.values():
        assert bias.dtype == torch.float32
        # Four steps of +u, -u or 0 each less their mean over four experts, of which bf16 would know three digits.
        steps_E = bias / 0.0011
        torch.testing.assert_close(4 * steps_E, (4 * steps_E).round(), atol=4e-4, rtol=0)
        assert steps_E.sum().abs() < 1e-3
        assert 0 < steps_E.abs().max() <= 6.001
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == dtype
    loaded = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(loaded, biases["model.layers.1.mlp.gate.e_score_correction_bias"])


@pytest.mark.parametrize(
    "family", ["ernie4_5_moe", "dots1", "solar_open", "deepseek_v3", "minimax_m2", "lfm2_moe", "afmoe"]
)
def test_families_that_store_a_selection_bias_get_it_back(tmp_path: Path, jsonl: Path, family: str) -> None:
    """The names that --help, the error and the docs give: trained, saved in bf16, read by transformers."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_with_bias(family, source)
    arguments = ["--balance", "loss-free=0.0011", "--save-dtype", "bfloat16", "--val-fraction", 0]
    code, _, stderr = cpt(source, out, jsonl, *arguments, steps=3)
    assert (code, stderr) == (0, "")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    places = selection_biases(model, RouterCapture(model).routers)
    assert len(places) == 2
    for module, name in places:
        steps = getattr(module, name).detach() / 0.0011
        assert steps.abs().max() > 0.4
        torch.testing.assert_close(4 * steps, (4 * steps).round(), atol=4e-4, rtol=0)
        assert steps.sum().abs() < 1e-3


def save_with_bias(family: str, folder: Path) -> None:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "num_experts_per_tok": 2, "moe_k": 2, "moe_num_experts": 4, "num_experts": 4, "num_local_experts": 4,
        "first_k_dense_replace": 0, "moe_layer_start_index": 0, "num_dense_layers": 0, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2,
        "routed_scaling_factor": 1.0, "partial_rotary_factor": 1.0,
        "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    if family == "deepseek_v3":  # latent attention
        sizes |= {"num_key_value_heads": 4}
    config = AutoConfig.for_model(family, **sizes)
    if hasattr(config, "n_routed_experts"):
        config.n_routed_experts = 4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)


@pytest.mark.parametrize(
    ("family", "strategies", "more", "later"),
    [
        ("glm4_moe", ["loss-free=0.01"], [], []),
        # What may change, and a state that is kept.
        ("glm4_moe", ["adaptive-aux=0.1", "global-aux", "seq-aux", "erc"], [], ["--gradient-checkpointing"]),
        ("glm4_moe", ["sinkhorn"], ["--freeze-router"], []),
        ("ernie4_5_moe", ["loss-free=0.01"], [], ["--deterministic"]),  # its bias is a parameter
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path, jsonl: Path, dtype: torch.dtype, family: str, strategies: list[str], more: list[str],
    later: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from moetool.train.loop import Run

    source = tmp_path / "source"
    if family == "glm4_moe":
        tiny.save_glm4_moe(source, dtype=dtype, attention_dropout=0.1)
    else:
        save_with_bias(family, source)
    args = [*options(strategies), *more, "--save-every", 2, "--save-dtype", str(dtype).removeprefix("torch.")]
    assert cpt(source, tmp_path / "straight", jsonl, *args, steps=6)[0] == 0

    update = Run._update
    with monkeypatch.context() as patch:

        def failing(run: Run) -> dict[str, Any]:
            if run.step == 5:
                raise KeyboardInterrupt
            return update(run)

        patch.setattr(Run, "_update", failing)
        assert cpt(source, tmp_path / "stopped", jsonl, *args, steps=6)[0] == 130
    code, _, _ = cpt(source, tmp_path / "stopped", jsonl, *args, *later, steps=6)
    assert code == 0
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")
    straight, stopped = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(value, stopped[name]) for name, value in straight.items())


def biases(folder: Path) -> list[Tensor]:
    return [tensor for name, tensor in weights(folder).items() if name.endswith("e_score_correction_bias")]


def test_loss_free_ends_where_it_is_told(tmp_path: Path, models: dict[str, Path], jsonl: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--balance", "loss-free=0.01", "--balance-end", 0.6, "--save-every", 1, "--keep-checkpoints", 5]
    assert cpt(models["glm4_moe"], out, jsonl, *arguments, "--val-fraction", 0, steps=5)[0] == 0
    moved = [biases(out / f"checkpoints/step-{step:06d}") for step in range(1, 6)]
    for before, after in pairwise(moved[:3]):
        assert any(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
    for later in moved[3:]:  # after update round(0.6 x 5)
        assert all(torch.equal(b, a) for b, a in zip(moved[2], later, strict=True))


def test_a_run_from_before_biases_were_centred_goes_on_without_it(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arguments = tmp_path / "out", ["--balance", "loss-free=0.01", "--save-every", 2, "--val-fraction", 0]
    identity = TrainConfig.identity
    new = ("centred", "balance-end", "train-only", "router-lr")

    def earlier(self: TrainConfig, *known: Any) -> dict[str, Any]:
        return {name: value for name, value in identity(self, *known).items() if name not in new}

    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "identity", earlier)
        assert cpt(models["glm4_moe"], out, jsonl, *arguments)[0] == 0
    straight = biases(out)
    for bias in straight:
        torch.testing.assert_close(bias / 0.01, (bias / 0.01).round(), atol=1e-4, rtol=0)
    assert any(bias.sum().abs() > 0.005 for bias in straight)
    assert cpt(models["glm4_moe"], out, jsonl, *arguments)[0] == 0  # finished, and the same run
    _unfinish(out)
    assert cpt(models["glm4_moe"], out, jsonl, *arguments)[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(straight, biases(out), strict=True))
    assert "centred" not in json.loads((out / "summary.json").read_text())["identity"]


def _unfinish(out: Path) -> None:
    """Leave what a kill after the save before the last leaves."""
    shutil.rmtree(sorted((out / "checkpoints").iterdir())[-1])
    for name in ("config.json", "summary.json"):
        (out / name).unlink()
    state.claim(out)


def test_a_lost_state_of_a_strategy_is_not_made_up(tmp_path: Path, models: dict[str, Path], jsonl: Path) -> None:
    out, arguments = tmp_path / "out", ["--balance", "adaptive-aux", "--save-every", 2, "--val-fraction", 0]
    assert cpt(models["mixtral"], out, jsonl, *arguments)[0] == 0
    assert all(len(row["adaptive_aux"]) == 2 for row in all_rows(out))
    _unfinish(out)
    folder = out / "checkpoints/step-000002/training_state"
    document = json.loads((folder / "state.json").read_text())
    del document["files"]["training_state/balance.safetensors"]
    (folder / "state.json").write_text(json.dumps(document))
    code, _, stderr = cpt(models["mixtral"], out, jsonl, *arguments)
    assert code == 1
    assert "it holds no adaptive-aux of this model); delete that step folder" in stderr
    # Another run begins with its own.
    code, _, stderr = cpt(folder.parent, tmp_path / "next", jsonl, *arguments, "--keep-optimizer", steps=1)
    assert (code, stderr) == (0, "")
    assert all_rows(tmp_path / "next")[0]["adaptive_aux"] == [0.01, 0.01]


def all_rows(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in read]


def test_a_killed_run_goes_on_with_every_state_bit_for_bit(
    tmp_path: Path, models: dict[str, Path], jsonl: Path
) -> None:
    """SIGKILL of a real process, at an instant of its own choosing."""
    model, steps = models["glm4_moe"], 40
    arguments = [*options(["adaptive-aux=0.1", "loss-free=0.01", "erc", "seq-aux"]), "--balance-end", 0.9]
    arguments = [*arguments, "--router-lr", 3, "--train-only", "routers", "--save-every", 4, "--eval-every", 40]
    assert cpt(model, tmp_path / "straight", jsonl, *arguments, steps=steps)[0] == 0
    out = tmp_path / "killed"
    words = ["cpt", model, out, "--train", f"new={jsonl}", "--max-steps", steps, *SMALL, *arguments]
    running = forked.start(tmp_path / "first", *words)
    forked.wait_until(lambda: bool(list((out / "checkpoints").glob("step-*"))), running, 200)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    saved = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert saved
    assert saved[-1] < "step-000040"
    assert cpt(model, out, jsonl, *arguments, steps=steps)[0] == 0
    assert all_rows(out) == all_rows(tmp_path / "straight")
    coefficients = [row["adaptive_aux"] for row in all_rows(out) if "loss" in row]
    assert coefficients[0] == [0.1, 0.1]
    assert coefficients[-1] != coefficients[0]
    straight, resumed = weights(tmp_path / "straight"), weights(out)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    last = "checkpoints/step-000040/training_state/balance.safetensors"
    assert (out / last).read_bytes() == (tmp_path / "straight" / last).read_bytes()


def test_frozen_routers_stay_as_they_are(tmp_path: Path, models: dict[str, Path], jsonl: Path) -> None:
    out = tmp_path / "out"
    assert cpt(models["glm4_moe"], out, jsonl, "--freeze-router", "--balance", "loss-free", "--weight-decay", 1)[0] == 0
    before, after = weights(models["glm4_moe"]), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    assert not changed & routers
    assert any("experts" in name for name in changed)
    assert sum(name.endswith("e_score_correction_bias") for name in changed) == 2

    plain = tmp_path / "plain"  # no --balance: the default losses have no use
    assert cpt(models["mixtral"], plain, jsonl, "--freeze-router", steps=1)[0] == 0
    assert rows(plain)[1]["balance"] == {}
    code, _, stderr = cpt(models["mixtral"], plain, jsonl, steps=1)
    assert code == 1
    assert "--freeze-router (True before, False now)" in stderr


@pytest.mark.parametrize(
    ("family", "more", "code", "message"),
    [
        ("mixtral", ["--balance", "sinkhorn", "--balance", "loss-free"], 2, "give one of them"),
        ("mixtral", ["--balance", "sinkhorn=0.1"], 2, "'sinkhorn' takes no coefficient"),
        ("mixtral", ["--balance", "none", "--balance", "aux"], 2, "cannot be combined with others"),
        (
            "mixtral",
            ["--freeze-router", "--balance", "z-loss"],
            2,
            "does not learn from --balance z-loss; only sinkhorn, loss-free",
        ),
        ("mixtral", ["--balance", "loss-free"], 1, "'mixtral' cannot store a selection bias"),
        ("llama", ["--freeze-router"], 1, "is a dense model without a router"),
        ("llama", ["--balance", "sinkhorn"], 1, "is a dense model without a router"),
    ],
)
def test_contradictions_are_one_line_and_leave_nothing(
    tmp_path: Path, models: dict[str, Path], llama: Path, jsonl: Path, family: str, more: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    result = cpt({**models, "llama": llama}[family], tmp_path / "out", jsonl, *more)
    assert result[0] == code
    assert message in " ".join(result[2].replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "top_k", "more", "trained"),
    [
        ("mixtral", 1, [], "only aux, z-loss train it"),
        ("glm4_moe", 1, ["--balance", "global-aux"], "only global-aux trains it"),  # its weight is 1.5
        ("mixtral", 1, ["--balance", "sinkhorn"], "nothing trains it"),
        ("mixtral", 1, ["--freeze-router"], None),
        ("mixtral", 2, [], None),
    ],
)
def test_a_router_without_gradient_from_the_language_loss_is_warned_of(
    tmp_path: Path, jsonl: Path, family: str, top_k: int, more: list[str], trained: str | None
) -> None:
    model = getattr(tiny, f"save_{family}")(tmp_path / "model", num_experts_per_tok=top_k)
    arguments = ["cpt", model, tmp_path / "out", "--train", f"new={jsonl}", "--max-steps", 1, *SMALL[:-2], *more]
    code, _, stderr = tiny.in_process(*arguments)
    assert code == 0
    said = " ".join(stderr.split())
    assert ("gives the router no gradient" in said) == (trained is not None)
    assert trained is None or trained in said


@pytest.mark.parametrize("more", [["--gradient-checkpointing"], ["--deterministic"]])
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_how_a_run_is_computed_does_not_change_it(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, family: str, more: list[str]
) -> None:
    strategies = options(["sinkhorn", "z-loss"] if family == "mixtral" else ["loss-free", "global-aux"])
    assert cpt(models[family], tmp_path / "plain", jsonl, *strategies)[0] == 0
    assert cpt(models[family], tmp_path / "other", jsonl, *strategies, *more)[0] == 0
    assert rows(tmp_path / "plain") == rows(tmp_path / "other")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_compiled_run_is_the_same_to_rounding(
    tmp_path: Path, jsonl: Path, light_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    compiled: dict[str, int] = {}
    reset = torch._dynamo.reset

    def count_and_reset() -> None:
        compiled.update(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))
        reset()

    monkeypatch.setattr(torch._dynamo, "reset", count_and_reset)
    model = tiny.save_glm4_moe(tmp_path / "model", num_hidden_layers=1, first_k_dense_replace=0)
    args = [*options(["loss-free", "aux"]), "--val-fraction", 0.2, "--gradient-checkpointing"]
    assert cpt(model, tmp_path / "plain", jsonl, *args)[0] == 0
    counters.clear()
    code, _, stderr = cpt(model, tmp_path / "other", jsonl, *args, "--compile")
    assert (code, stderr) == (0, "")
    # The model, once for all steps and validations, and the trial of the compiler.
    assert compiled == {"graphs": 2, "breaks": 0}
    _same_to_rounding(tmp_path / "plain", tmp_path / "other")


def _same_to_rounding(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a["step"] == b["step"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            assert a["balance"] == pytest.approx(b["balance"], rel=1e-3)


def test_what_cannot_be_compiled_is_one_line(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    code, _, stderr = cpt(models["mixtral"], tmp_path / "out", jsonl, "--compile")
    assert code == 1
    assert "--compile: torch cannot compile this here" in stderr
    assert "No working C++ compiler" in stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_training_batches_have_no_padding(tmp_path: Path, jsonl: Path) -> None:
    """Counts, probabilities and Sinkhorn's assignment are over all tokens, so all must be text."""
    from moetool.train.batches import micro_batches, mix, open_corpus

    source = tiny.save_mixtral(tmp_path / "model")
    config = TrainConfig(
        source, tmp_path / "out", {"new": str(jsonl)}, max_steps=50, seq_len=100, global_batch_size=4,
        micro_batch_size=2, replay_ratio=0.0,
    )  # fmt: skip
    corpus = open_corpus(config, 300)
    stream = corpus.train["new"]
    known = set(stream.read(0, stream.num_tokens).tolist())
    mixture = mix(corpus, config)
    for step in range(50):  # several epochs of a text that is no multiple of the sequence
        for micro in micro_batches(mixture, config, step, 0, 1):
            assert micro.inputs.shape == (2, 100)
            assert {*micro.inputs.flatten().tolist(), *micro.labels.flatten().tolist()} <= known


@pytest.mark.slow
def test_compiled_to_machine_code(tmp_path: Path, models: dict[str, Path], jsonl: Path) -> None:
    args = ["--train", f"new={jsonl}", "--max-steps", 3, *SMALL, *options(["sinkhorn", "z-loss"])]
    assert tiny.cli("cpt", models["mixtral"], tmp_path / "plain", *args).returncode == 0
    compiled = tiny.cli("cpt", models["mixtral"], tmp_path / "other", *args, "--compile", timeout=900)
    assert compiled.returncode == 0, compiled.stderr
    _same_to_rounding(tmp_path / "plain", tmp_path / "other")


def _torchrun(processes: int, model: Path, out: Path, text: Path, *more: object) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "-m", "moetool", "cpt", model, out, "--train", f"new={text}", "--max-steps", 4, *SMALL, *more,
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [["loss-free=0.01", "aux"], ["sinkhorn", "z-loss"], ["pooled-aux"]])
def test_two_processes_balance_as_one(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, strategies: list[str]
) -> None:
    model = models["glm4_moe"]
    _torchrun(2, model, tmp_path / "two", jsonl, *options(strategies))
    assert cpt(model, tmp_path / "one", jsonl, *options(strategies))[0] == 0
    _same_to_rounding(tmp_path / "one", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(one[name], two[name])


@pytest.mark.slow
def test_global_aux_of_two_processes_is_aux_of_one_that_sees_all(
    tmp_path: Path, models: dict[str, Path], jsonl: Path
) -> None:
    """Four sequences, two a process: counted together they are one micro-batch of four."""
    _torchrun(2, models["mixtral"], tmp_path / "two", jsonl, "--balance", "global-aux=0.5")
    wide = ["--micro-batch-size", 4, "--balance", "aux=0.5"]
    assert cpt(models["mixtral"], tmp_path / "one", jsonl, *wide)[0] == 0
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
            assert one["balance"]["aux"] == pytest.approx(two["balance"]["global-aux"], rel=1e-4)


TEACHER: dict[str, Any] = {}


def forward_kl(forward: Forward) -> Tensor:
    """Mean over tokens of KL(teacher || model): a term that is no balance loss, and brings a model of its own."""
    with torch.no_grad():
        teacher_TV = logits(TEACHER["model"], forward.batch, torch.device("cpu")).flatten(0, 1).float()
    model_TV, teacher_TV = forward.logits_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    return F.kl_div(model_TV, teacher_TV, log_target=True, reduction="batchmean")[None]


KL = Term(forward_kl, 1.0, needs=("logits",))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_term_may_read_the_logits_and_ask_a_teacher(
    tmp_path: Path, models: dict[str, Path], jsonl: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.REGISTRY["balance"], "kl", f"{__name__}:KL")
    monkeypatch.setitem(TEACHER, "model", load_model(models["mixtral"], "float32").eval())
    taught: dict[float, list[dict[str, Any]]] = {}
    for coefficient in (1e-9, 100):
        out = tmp_path / f"{coefficient}"
        more = ["--balance", f"kl={coefficient}", "--balance", "aux", "--precision", precision, "--warmup-steps", 0]
        assert cpt(models["mixtral"], out, jsonl, *more)[0] == 0
        taught[coefficient] = [row for row in rows(out) if "loss" in row]
    (first, second), (taught_first, taught_second) = taught[1e-9][:2], taught[100][:2]
    near = 1e-6 if precision == "fp32" else 1e-3
    assert first["balance"]["kl"] == pytest.approx(0, abs=near)  # the teacher is the model that training begins with
    assert second["balance"]["kl"] > 10 * near
    assert taught_first["loss"] == first["loss"]  # of the language loss alone
    assert taught_second["grad_norm"] > 2 * second["grad_norm"]
