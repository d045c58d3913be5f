"""bf16 weights under fp32 ones, and the loss in chunks: every target family against fp32, and the parts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetool.checkpoint.model import load_model
from moetool.routing.capture import RouterCapture
from moetool.train import loss as language
from moetool.train import mixed
from moetool.train.balance import aux, count_routes, z_loss
from moetool.train.batches import IGNORED, MicroBatch
from tests import tiny
from tests.integration.test_upcycle_families import SPECS, make, upcycle

CPU = torch.device("cpu")


def gradients(folder: Path, half: bool, autocast: bool = False) -> tuple[float, dict[str, Tensor], Any]:
    """Language and balance loss of two micro-batches; the gradient of each parameter, in fp32."""
    model: Any = load_model(folder, "float32")
    capture = RouterCapture(model)
    updated = mixed.cast(model, capture) if half else dict(model.named_parameters())
    language_loss = (language.chunked_loss(model) if half else None) or language.whole_loss
    assert (language_loss is language.whole_loss) != half
    model.train()
    total = 0.0
    for micro in range(2):
        tokens = torch.randint(1, 300, (2, 17), generator=torch.Generator().manual_seed(micro))
        with capture.collect() as routes, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = language_loss(model, MicroBatch(tokens[:, :-1], tokens[:, 1:], None), CPU) / 64
        forward = tiny.forward(routes, count_routes(routes))
        for term in (aux, z_loss):
            loss = loss + term(forward).mean() / 2
        assert all(route.logits_TE.dtype == torch.float32 for route in routes)
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad for name, p in updated.items() if p.grad is not None}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    return total, found, model


def likeness(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The cosine between two gradients of a whole model."""
    flat = [torch.cat([part[name].flatten() for name in sorted(part)]) for part in (one, two)]
    return float(F.cosine_similarity(flat[0], flat[1], dim=0))


@pytest.mark.parametrize("target", SPECS)
def test_every_family_trains_in_bf16(target: str, tmp_path: Path) -> None:
    dense = make((SPECS[target].dense[0], target), tmp_path / "dense")
    moe = upcycle(dense, tmp_path / "moe", target, "--num-experts", 4, "--drop-ratio", 0.5)
    exact_loss, exact, _ = gradients(moe, half=False)
    loss, found, model = gradients(moe, half=True)
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert found.keys() == exact.keys()
    if likeness(found, exact) < 0.98:  # Qwen3.5 divides by the lengths of small vectors, which bf16 rounds
        _, other, _ = gradients(moe, half=False, autocast=True)
        assert likeness(found, exact) > likeness(other, exact)
    kept = {p.dtype for name, p in model.named_parameters() if "experts" in name and p.ndim == 3}
    assert kept == {torch.bfloat16}
    assert all(p.grad is None for p in model.parameters() if p.dtype == torch.bfloat16)


def test_an_update_is_fp32_and_the_model_its_rounding(tmp_path: Path) -> None:
    model: Any = load_model(tiny.save_mixtral(tmp_path / "model"), "float32")
    capture = RouterCapture(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updated = mixed.cast(model, capture)
    assert all(torch.equal(updated[name], before[name]) for name in before)
    with torch.no_grad():
        for weight in updated.values():
            weight.add_(1e-5)  # below bf16's spacing: it counts all the same
    mixed.cast_back(updated, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(updated[name], before[name] + 1e-5)
        router = name.endswith("gate.weight")
        assert parameter.dtype == (torch.float32 if router else torch.bfloat16)
        assert torch.equal(parameter, updated[name].to(parameter.dtype))


def test_a_gradient_is_added_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16, whose integers end there."""
    model = nn.Linear(1, 1, bias=False)
    updated = mixed.cast(model, None)
    for value in (256.0, 1.0):
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert updated["weight"].grad == 257.0


@pytest.mark.parametrize("elements", [2**28, 7 * 50, 50])  # at once, in uneven chunks, a token at a time
def test_the_loss_in_chunks_is_cross_entropy(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(16, 8, generator=generator).requires_grad_()
    weight_VD = torch.randn(50, 8, generator=generator).requires_grad_()
    labels_T = torch.randint(50, (16,), generator=generator)
    labels_T[3] = IGNORED
    expected = F.cross_entropy(hidden_TD @ weight_VD.T, labels_T, ignore_index=IGNORED, reduction="sum") / 5
    wanted = torch.autograd.grad(expected, (hidden_TD, weight_VD))
    step = language._loss_and_gradient
    loss = language._LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, step, True) / 5
    torch.testing.assert_close(loss, expected)
    for found, right in zip(torch.autograd.grad(loss, (hidden_TD, weight_VD)), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("change", "scales"), [("factor", True), ("nothing", True), ("cap", False), ("bias", False)])
def test_what_a_family_does_to_its_logits_is_found_out(change: str, scales: bool, tmp_path: Path) -> None:
    model: Any = load_model(tiny.save_mixtral(tmp_path / "model"), "float32")
    mixed.cast(model, RouterCapture(model))
    head, forward = model.lm_head, model.forward
    if change == "bias":
        head.bias = nn.Parameter(torch.zeros(head.out_features, dtype=torch.bfloat16))

    def changed(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.logits = out.logits / 8 if change == "factor" else out.logits
        out.logits = 30 * torch.tanh(out.logits / 30) if change == "cap" else out.logits
        return out

    model.forward = changed
    tokens = torch.randint(1, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], None)
    found = language.chunked_loss(model)
    assert (found is not None) == scales
    if found:
        whole = language.whole_loss(model, batch, CPU)
        torch.testing.assert_close(found(model, batch, CPU), whole, rtol=1e-3, atol=0)
