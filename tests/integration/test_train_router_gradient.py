"""Router gradients from experts that were not chosen, against their definition; the forward stays the stock one.

Shapes: T tokens, E experts, K top-k, D hidden.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moetool.checkpoint.model import load_model
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import router_names, sizes_of
from moetool.errors import ConfigError
from moetool.routing.capture import RouterCapture
from moetool.train.config import TrainConfig
from moetool.train.loop import Run
from moetool.train.router_gradient import DECAY, RouterGradient, check
from tests import forked, launched, tiny
from tests.integration.test_routing_families import FAMILIES, SMALL

IDS = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
# How a family weighs: (score of logits, whether the chosen are divided by their sum, the factor).
RULES: dict[str, tuple[Callable[[Tensor], Tensor], bool, float]] = {
    "mixtral": (lambda z: z.softmax(-1), True, 1.0),
    "olmoe": (lambda z: z.softmax(-1), False, 1.0),
    "deepseek_v3": (torch.sigmoid, True, 2.5),
}
REFUSED = {"phimoe"}


def built(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family][0]), dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    return model.train()


def changed(kind: Any, model: Any) -> RouterGradient:
    capture = RouterCapture(model)
    return RouterGradient(kind, model, capture, capture)


def step(model: Any, gradient: RouterGradient | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss on them, in float32."""
    logits = model(input_ids=IDS, use_cache=False).logits
    if gradient:
        gradient.collect()
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.float() * target).sum().backward()
    found = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return logits.detach(), found


def by_definition(model: Any, family: str, vectors: dict[int, Tensor] | None = None) -> None:
    """y + D - sg(D), written out: D of all other experts' outputs (each computed by itself), or of given vectors."""
    score, normalised, factor = RULES[family]
    for layer, router in RouterCapture(model).routers.items():
        experts = model.model.layers[layer].mlp.experts
        seen: dict[str, Tensor] = {}
        router.register_forward_hook(lambda module, args, out, seen=seen: seen.update(z=out[0]))

        def forward(hidden: Tensor, chosen: Tensor, weights: Tensor, experts=experts, seen=seen, layer=layer) -> Tensor:  # type: ignore[no-untyped-def]
            stock = type(experts).forward
            y = stock(experts, hidden, chosen, weights)
            p = score(seen["z"].float().reshape(len(hidden), -1))
            total = p.gather(1, chosen).sum(1, keepdim=True).detach() if normalised else 1.0
            for e in range(p.shape[1]):
                every = torch.full((len(hidden), 1), e)
                made = (
                    stock(experts, hidden, every, torch.ones(len(hidden), 1)) if vectors is None else vectors[layer][e]
                )
                weight = factor * (p / total)[:, e] * ~(chosen == e).any(1)
                d = weight[:, None] * made.detach()
                y = y + d - d.detach()
            return y  # type: ignore[no-any-return]

        experts.forward = forward


@pytest.mark.parametrize("family", RULES)
def test_dense_is_the_gradient_of_all_experts(family: str) -> None:
    plain, _ = step(built(family))
    model, other = built(family), built(family)
    gradient = changed("dense", model)
    logits, found = step(model, gradient)
    by_definition(other, family)
    _, expected = step(other)
    assert torch.equal(logits, plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("family", RULES)
def test_default_is_the_gradient_of_averages(family: str) -> None:
    plain, sparse = step(built(family))
    model, other = built(family), built(family)
    gradient = changed("default", model)
    gradient.state["default-outputs"].normal_(generator=torch.Generator().manual_seed(2))
    layers = RouterCapture(model).layers
    by_definition(other, family, dict(zip(layers, gradient.state["default-outputs"].clone(), strict=True)))
    logits, found = step(model, gradient)
    _, expected = step(other)
    assert torch.equal(logits, plain)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()), msg=name)
    last = max(router_names(model))  # nothing but its own router is before the last experts, so these learn as before
    assert not torch.allclose(found[last], sparse[last], rtol=1e-2)
    assert all(torch.equal(found[name], sparse[name]) for name in found if f"layers.{layers[-1]}.mlp.experts" in name)


def test_an_average_moves_by_what_an_expert_made_of_its_tokens() -> None:
    """By hand: three steps of an average of 0.9, in which one expert has no tokens once."""
    model = built("mixtral")
    gradient = changed("default", model)
    state = gradient.state["default-outputs"]
    L, E, D = state.shape
    assert (L, E, D) == (3, 4, 32)
    assert DECAY == 0.9
    expected = torch.zeros(E)
    # Of each step: (sum of outputs in each coordinate, tokens) of each expert, in two processes.
    for sums, counts in (([8.0, 2, 0, 6], [4, 1, 0, 3]), ([5.0, 0, 9, 1], [5, 0, 3, 2])):
        gradient._sums_LED[:] = torch.tensor(sums)[None, :, None] / 2
        gradient.update(torch.tensor(counts).expand(L, E), lambda half: 2 * half)
        for e in range(E):
            if counts[e]:
                expected[e] = 0.9 * expected[e] + 0.1 * sums[e] / counts[e]
        torch.testing.assert_close(state, expected[None, :, None].expand(L, E, D))
    assert expected.tolist() == pytest.approx([0.9 * 0.2 + 0.1, 0.2, 0.3, 0.9 * 0.2 + 0.05])


def test_copies_tell_a_router_nothing() -> None:
    """In a family that does not divide by the sum of the chosen: sum of all dp_i E(x) = 0."""
    _, different = step(built("olmoe"))
    model = built("olmoe")
    gradient = changed("dense", model)
    for layer in RouterCapture(model).layers:
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            experts.gate_up_proj[:], experts.down_proj[:] = experts.gate_up_proj[:1], experts.down_proj[:1]
    _, found = step(model, gradient)
    for name in router_names(model):
        assert found[name].abs().max() < 1e-3 * different[name].abs().max()


def test_averages_are_of_the_outputs_of_routes() -> None:
    model = built("mixtral")
    capture = RouterCapture(model)
    gradient = RouterGradient("default", model, capture, capture)
    experts = model.model.layers[0].mlp.experts
    inputs: list[Tensor] = []
    experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    with capture.collect() as routes:
        step(model, gradient)
    chosen_TK, hidden_TD = routes[0].indices_TK, inputs[0]
    for e in range(4):
        mine_TD = hidden_TD[(chosen_TK == e).any(1)]
        gate, up = (mine_TD @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        made_TD = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T
        torch.testing.assert_close(gradient._sums_LED[0, e], made_TD.detach().sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED))
def test_the_forward_of_every_family_is_the_stock_one(family: str, kind: Any, dtype: torch.dtype) -> None:
    try:
        model = built(family, dtype)
    except (KeyError, ValueError) as error:
        pytest.skip(f"not in this version of transformers: {error}")
    plain, sparse = step(model)
    gradient = changed(kind, model)
    for vectors in gradient.state.values():
        vectors.normal_()
    logits, found = step(model, gradient)
    assert torch.equal(logits, plain)
    assert any(not torch.equal(found[name], sparse[name]) for name in router_names(model) & found.keys())


@pytest.mark.parametrize("how", ["checkpointing", "compiled"])
@pytest.mark.parametrize("kind", ["default", "dense"])
def test_gradients_are_the_same_however_a_run_is_computed(kind: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moetool.train.execution import compile_layers

    found = []
    for changed in (False, True):
        model = built("deepseek_v3")
        capture = RouterCapture(model)
        gradient = RouterGradient(kind, model, capture, capture)
        for vectors in gradient.state.values():
            vectors.normal_(generator=torch.Generator().manual_seed(2))
        if changed and how == "checkpointing":
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if changed and how == "compiled":
            monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
            compile_layers(model)
        _, gradients = step(model, gradient)
        sums = {"sums": gradient._sums_LED} if kind == "default" else {}
        found.append(gradients | sums)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()), msg=name)


OPTIONS = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 1, "--lr", 1e-3, "--val-fraction", 0]


def gradient_norms(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["grad_norm"] for row in rows if "loss" in row]


def test_two_processes_learn_alike(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    """With whole weights in each (DDP), and with shards (FSDP)."""

    def command(out: str, *more: object) -> list[object]:
        return ["cpt", mixtral, tmp_path / out, "--train", f"new={jsonl}", *OPTIONS, "--max-steps", 6, *more]

    kinds = {kind: ("--router-gradient", kind) for kind in ("default", "dense")}
    for kind, words in kinds.items():
        assert tiny.in_process(*command(kind, *words))[0] == 0
    assert tiny.in_process(*command("sparse"))[0] == 0
    meshes: dict[str, list[object]] = {"ddp": [], "fsdp": ["--fsdp", 2]}
    two = [command(f"{kind}-{name}", *words, *mesh) for kind, words in kinds.items() for name, mesh in meshes.items()]
    for processes in launched.launch(2, tmp_path, *two):
        assert [done.code for done in processes] == [0, 0], processes[0].stderr
    sparse = gradient_norms(tmp_path / "sparse")
    for kind in kinds:
        one = gradient_norms(tmp_path / kind)
        assert (one[0] == sparse[0]) == (kind == "default")  # averages begin at 0
        assert one[1:] != pytest.approx(sparse[1:], rel=1e-4)
        for name in meshes:
            assert gradient_norms(tmp_path / f"{kind}-{name}") == pytest.approx(one, rel=1e-4)


def die_at_step_5(saved: str) -> None:
    """Have this process killed as soon as the folder of step 4 is there."""
    update = Run._update

    def killed(self: Run) -> Any:
        while self.step == 5:
            if os.path.isdir(saved):  # a thread writes it
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        return update(self)

    Run._update = killed  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["default", "dense"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, mixtral: Path, jsonl: Path, kind: str) -> None:
    steps = ["--max-steps", 6, "--save-every", 2]
    command = ["--train", f"new={jsonl}", *OPTIONS, *steps, "--router-gradient", kind, "--precision", "bf16"]
    assert tiny.in_process("cpt", mixtral, tmp_path / "straight", *command)[0] == 0
    out = tmp_path / "killed"
    before = f"{__name__}:die_at_step_5:{out / 'checkpoints/step-000004'}"
    killed = forked.start(tmp_path / "first", "cpt", mixtral, out, *command, before=before).wait()
    assert killed.code == -signal.SIGKILL
    state = out / "checkpoints/step-000004/training_state"
    assert any("balance" in path.name for path in state.iterdir()) == (kind == "default")
    assert tiny.in_process("cpt", mixtral, out, *command)[0] == 0
    assert gradient_norms(out) == gradient_norms(tmp_path / "straight")
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "straight"))
    assert one == other
    code_, _, stderr = tiny.in_process("cpt", mixtral, out, *command, "--router-gradient", "sparse")
    assert code_ == 1
    assert "--router-gradient" in stderr


def test_the_plan_tells_what_it_costs(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    """A token takes 2 of 4 experts; the other 2 take 2 operations per parameter, without a backward."""
    more = [*OPTIONS, "--max-steps", 1, "--router-gradient", "dense"]
    code, stdout, stderr = tiny.in_process("cpt", mixtral, tmp_path / "out", "--train", f"new={jsonl}", *more)
    assert code == 0, stderr
    text = json.loads((mixtral / "config.json").read_text())
    routed = 2 * 3 * text["hidden_size"] * text["intermediate_size"] * text["num_hidden_layers"]
    model = load_model(mixtral, "float32")
    share = 2 * routed / flops_per_token(sizes_of(model), 16)
    assert f"router gradient dense: {share:.1%} more operations" in " ".join(stdout.split())


def test_what_cannot_be_is_refused() -> None:
    def why(kind: str, model: Any, **more: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check(TrainConfig(Path("m"), Path("o"), {}, router_gradient=kind, **more), model)  # type: ignore[arg-type]
        return str(error.value)

    settings: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 4}
    all_chosen = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL | settings))
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    assert "--experts-implementation eager does not return" in why(
        "dense", built("mixtral"), experts_implementation="eager"
    )
    assert "every token is sent to all 4 experts" in why("default", all_chosen)
    assert "the weights that PhimoeTopKRouter" in why("default", built("phimoe"))
    assert "m is a dense model" in why("dense", dense)
    assert "needs whole experts" in why("dense", built("mixtral"), fsdp=1, ep=2)
