"""The loss of tokens with a teacher, by hand and against autograd; which sequences have one; what one costs."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moetool.checkpoint.model import load_model, skeleton
from moetool.cost import memory
from moetool.cost.memory import Training
from moetool.cost.parameters import sizes_of
from moetool.data.mixture import Source, TokenMixture
from moetool.errors import CheckpointError, ConfigError
from moetool.mesh import Mesh
from moetool.train import loss
from moetool.train.batches import IGNORED, MicroBatch, micro_batches
from moetool.train.config import TrainConfig
from moetool.train.differences import differences
from moetool.train.teacher import Teacher, check_teacher, ready, share_taught, teach_step
from tests import tiny

CPU = torch.device("cpu")


def config(model: Path, teacher: Path | None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": model, "out": Path("out"), "train": {"new": "new.txt"}, "replay": {"old": "old.txt"}, "max_steps": 4,
        "seq_len": 8, "global_batch_size": 4, "micro_batch_size": 2, "teacher": teacher,
    }  # fmt: skip
    return TrainConfig(**(values | changes)).resolve(128, {}, gpu=False)


def test_a_token_by_hand() -> None:
    """The model gives 1/4 and 3/4, the teacher 1/2 and 1/2; the second token follows."""
    model, even, label = torch.tensor([[0.0, log(3)]]), torch.zeros(1, 2), torch.tensor([1])
    # CE = -ln 3/4. KL = (ln (1/2)/(1/4) + ln (1/2)/(3/4)) / 2 = ln(4/3) / 2.
    sums, gradient = teach_step(model, label, even, 0.25, 1.0)
    assert sums.tolist() == pytest.approx([0.75 * log(4 / 3) + 0.25 * log(4 / 3) / 2, log(4 / 3), log(4 / 3) / 2])
    # 3/4 (1/4, -1/4) + 1/4 (-1/4, 1/4)
    assert gradient[0].tolist() == pytest.approx([0.125, -0.125])
    # At temperature 2 the odds are sqrt 3: the chances 1 / (1 + sqrt 3) = 0.3660254 and 0.6339746, their product
    # 0.2320508, and KL = -ln(4 * 0.2320508) / 2 = 0.0372523. Its factor is 1/4 * 2^2, that of its gradient 1/4 * 2.
    sums, gradient = teach_step(model, label, even, 0.25, 2.0)
    assert 1 / (1 + sqrt(3)) == pytest.approx(0.3660254)
    assert sums.tolist() == pytest.approx([0.75 * log(4 / 3) + 0.0372523, log(4 / 3), 0.0372523], abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.1875 - 0.0669873, -0.1875 + 0.0669873], abs=1e-6)
    # A teacher that knows one token more is asked for these two; a model that does is told nothing of its own third.
    more = torch.tensor([[0.0, 0.0, 9.0]])
    again, same = teach_step(model, label, more, 0.25, 2.0)
    assert torch.equal(again, sums)
    assert torch.equal(same, gradient)
    (_, _, divergence), wide = teach_step(torch.tensor([[0.0, log(3), 0.0]]), label, even, 1.0, 2.0)
    assert float(divergence) == pytest.approx(0.0372523, abs=1e-6)
    assert wide[0].tolist() == pytest.approx([-2 * 0.1339746, 2 * 0.1339746, 0], abs=1e-6)


def by_autograd(
    logits_TV: Tensor, labels_T: Tensor, teacher_RW: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What is trained on, the cross-entropy and the divergence, as the formula stands, in the tensors' own dtype."""
    taught, common = len(teacher_RW), min(logits_TV.shape[1], teacher_RW.shape[1])
    each_T = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="none")
    chances_RV = (teacher_RW[:, :common] / temperature).softmax(-1)
    model_RV = (logits_TV[:taught, :common] / temperature).softmax(-1)
    apart_R = (chances_RV * (chances_RV / model_RV).log()).sum(-1) * (labels_T[:taught] != IGNORED)
    trained = (1 - weight) * each_T[:taught].sum() + each_T[taught:].sum() + weight * temperature**2 * apart_R.sum()
    return trained, each_T.sum(), apart_R.sum()


@pytest.mark.parametrize("elements", [2**28, 7 * 50, 50])  # at once, in uneven chunks, a token at a time
@pytest.mark.parametrize(("temperature", "known", "taught"), [(1.0, 50, 9), (2.0, 54, 16), (2.0, 46, 3), (0.5, 50, 0)])
def test_value_and_gradient_in_chunks_are_those_of_autograd(
    elements: int, temperature: float, known: int, taught: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    draw = torch.Generator().manual_seed(0)
    states_TD, weight_VD = (torch.randn(rows, 8, generator=draw).requires_grad_() for rows in (16, 50))
    asked_RD, head_WD = torch.randn(taught, 12, generator=draw), torch.randn(known, 12, generator=draw)
    labels_T = torch.randint(46, (16,), generator=draw)
    labels_T[2] = IGNORED
    exact = [tensor.detach().double().requires_grad_() for tensor in (states_TD, weight_VD)]
    expected = by_autograd(exact[0] @ exact[1].T, labels_T, (asked_RD @ head_WD.T).double(), 0.3, temperature)
    wanted = torch.autograd.grad(expected[0] / 5, exact)

    made: list[int] = []

    def plain(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        made.append(logits_TV.numel())
        language_loss, gradient = loss.language_step(False)(logits_TV, labels_T)
        return torch.stack([language_loss, language_loss, torch.zeros(())]), gradient

    def step(logits_TV: Tensor, labels_T: Tensor, teacher_TW: Tensor) -> tuple[Tensor, Tensor]:
        made.append(max(logits_TV.numel(), len(teacher_TW) * 50))
        return teach_step(logits_TV, labels_T, teacher_TW, 0.3, temperature)

    batch = MicroBatch(labels_T[None], labels_T[None], None)
    sums = loss.linear_loss(states_TD, weight_VD, batch, plain, loss.Lesson(asked_RD, head_WD, step))
    assert sums.tolist() == pytest.approx([one.item() for one in expected], rel=1e-5, abs=1e-6)
    for found, right in zip(torch.autograd.grad(sums[0] / 5, (states_TD, weight_VD)), wanted, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    assert max(made) <= elements
    assert sum(made) == 16 * 50
    # Where heads do more than a product, both give logits.
    logits_TV = (states_TD @ weight_VD.T).detach().requires_grad_()
    lesson = loss.Lesson(asked_RD @ head_WD.T, None, step)
    assert loss.linear_loss(logits_TV, None, batch, plain, lesson).tolist() == pytest.approx(sums.tolist(), rel=1e-6)
    (by_logits,) = torch.autograd.grad(loss.linear_loss(logits_TV, None, batch, plain, lesson)[0] / 5, logits_TV)
    torch.testing.assert_close(by_logits.double() @ exact[1].detach(), wanted[0], rtol=1e-4, atol=1e-5)


def test_a_dense_teacher_of_some_sequences(mixtral: Path, llama: Path) -> None:
    """Every parameter's gradient against autograd over whole logits; the teacher sees its sequences alone."""
    model, dense = load_model(mixtral, "float32"), load_model(llama, "float32")
    model.eval()
    seen: list[Tensor] = []
    dense.register_forward_pre_hook(lambda _, args, named: seen.append(named["input_ids"]), with_kwargs=True)
    teacher = ready(dense, config(mixtral, llama, teacher_weight=0.4, teacher_temperature=2.0), model)
    assert not dense.training
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    seen.clear()
    tokens = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], None, taught=2)
    language_loss, found = teacher.teach(*teacher.read(model, batch, CPU), batch)
    assert [one.tolist() for one in seen] == [tokens[:2, :-1].tolist()]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(found.trained, parameters)
    logits_TV = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
    told_RV = dense(input_ids=tokens[:2, :-1]).logits.flatten(0, 1)
    expected = by_autograd(logits_TV, tokens[:, 1:].flatten(), told_RV, 0.4, 2.0)
    assert [found.trained.item(), language_loss.item(), *found.sums_2.tolist()] == pytest.approx(
        [*(one.item() for one in expected), 16], rel=1e-5
    )
    for name, one, right in zip(names, gradients, torch.autograd.grad(expected[0], parameters), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-5, msg=name)
    # Without such a sequence in its micro-batch, a process asks the teacher only where others need its shards.
    seen.clear()
    alone = replace(batch, taught=0)
    for shared, times in ((False, 0), (True, 1)):
        asked: Teacher = replace(teacher, shared=shared)
        all_alone, nothing = asked.teach(*asked.read(model, alone, CPU), alone)
        assert len(seen) == times
        assert nothing.sums_2.tolist() == [0, 0]
        assert nothing.trained.item() == pytest.approx(all_alone.item()) == pytest.approx(language_loss.item())


class Counting:
    """A stream of the numbers from `first` on."""

    def __init__(self, first: int, num_tokens: int) -> None:
        self.first, self.num_tokens = first, num_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        return np.arange(self.first + start, self.first + start + count, dtype=np.int64)


@pytest.mark.parametrize("world", [1, 2])
def test_only_replayed_sequences_have_the_teacher(world: int) -> None:
    streams: list[Any] = [Counting(0, 400), Counting(1000, 400)]
    sources = [Source("new", streams[0]), Source("old", streams[1], replay=True)]
    mixture = TokenMixture(sources, 8, 4, 0.3)
    counts = []
    for step in range(10):
        for rank in range(world):
            every = [
                micro_batches(mixture, config(Path("m"), *more), step, rank, world) for more in ((None,), (Path("t"),))
            ]
            for without, batch in zip(*every, strict=True):
                assert without.taught == 0
                assert sorted(without.inputs.tolist()) == sorted(batch.inputs.tolist())
                assert [bool(row[0] >= 1000) for row in batch.inputs] == [n < batch.taught for n in range(2)]
                counts.append(batch.taught)
            for batch in micro_batches(mixture, config(Path("m"), Path("t"), teacher_on="all"), step, rank, world):
                assert batch.taught == 2
    assert sum(counts) == 12  # 30 % of 40
    assert share_taught(config(Path("m"), Path("t"))) == 0.3
    assert share_taught(config(Path("m"), Path("t"), teacher_on="all")) == 1
    assert share_taught(config(Path("m"), None)) == 0


def test_a_teacher_that_does_not_fit_is_refused(tmp_path: Path, mixtral: Path, llama: Path) -> None:
    model = skeleton(mixtral)
    assert check_teacher(config(mixtral, None), model) is None
    assert check_teacher(config(mixtral, llama), model).config.model_type == "llama"
    other, short = tiny.save_llama(tmp_path / "other"), tiny.save_llama(tmp_path / "short", max_position_embeddings=4)
    tiny.save_tokenizer(other, 290)
    with pytest.raises(ConfigError, match=r"other: its tokenizer is not that of .*; give a model with the same"):
        check_teacher(config(mixtral, other), model)
    with pytest.raises(ConfigError, match=r"--seq-len 8: the teacher .*short has 4 positions; give at most that"):
        check_teacher(config(mixtral, short), model)
    cut = tiny.save_llama(tmp_path / "cut", vocab_size=200)
    with pytest.raises(ConfigError, match=r"cut: its tokenizer has 300 tokens, but it has 200 embedding rows"):
        check_teacher(config(mixtral, cut), model)
    with pytest.raises(ConfigError, match=r"--ep and --tp divide .*\(fsdp 2 x ep 2\); use --fsdp"):
        check_teacher(config(mixtral, llama, fsdp=2, ep=2), model)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        check_teacher(config(mixtral, tmp_path), model)


def test_a_teacher_is_known_by_its_content() -> None:
    without = config(Path("m"), None).identity("m", {})
    before = config(Path("m"), Path("t")).identity("m", {}, "1")
    assert differences(before, config(Path("m"), Path("elsewhere")).identity("m", {}, "1")) == []
    other = config(Path("m"), Path("t"), teacher_weight=0.9, teacher_on="all").identity("m", {}, "2")
    assert differences(before, other) == [
        "--teacher (other files)", "--teacher-on (replay before, all now)", "--teacher-weight (0.5 before, 0.9 now)",
    ]  # fmt: skip
    assert not [name for name in without if "teacher" in name]  # so that runs of before go on
    assert differences(without, before) == ["--teacher (new)"]
    assert differences(before, without) == ["--teacher (gone)"]


def test_the_memory_of_a_teacher(mixtral: Path, llama: Path) -> None:
    sizes, teacher = sizes_of(skeleton(mixtral)), sizes_of(skeleton(llama))
    total = teacher.total
    run = Training(seq_len=128, micro_batch_size=2, precision="bf16", teacher=teacher)
    without, need = (memory.estimate(sizes, one) for one in (replace(run, teacher=None), run))
    assert "teacher" not in without
    assert {name: value for name, value in need.items() if name not in ("teacher", "total")} == {
        name: value for name, value in without.items() if name != "total"
    }
    # bf16: a hidden state of 32; a layer's matrices have 64 + 48 + 48 + 64 + 3 * 96 in- and outputs, its norms (with a
    # half of the last one) 2.5 * 32 elements of three rows in fp32; logits, and four times as many in fp32.
    layer = 2 * (64 + 48 + 48 + 64 + 3 * 96) + 12 * 2.5 * 32
    assert need["teacher"] == 2 * total + 256 * (layer + 64) + (2 + 16) * 256 * 300
    assert need["total"] == without["total"] + need["teacher"]
    assert memory.estimate(sizes, replace(run, precision="fp32"))["teacher"] > 4 * total
    compiled = memory.estimate(sizes, replace(run, compiled_loss=True))
    assert need["teacher"] - compiled["teacher"] == 16 * 256 * 300
    # In fp32 the logits come in chunks, too, where there is a teacher.
    long = replace(run, precision="fp32", seq_len=2**20)
    assert 2 * long.seq_len * 300 >= memory.CHUNK_ELEMENTS
    less, more = (memory.estimate(sizes, one)["activations"] for one in (long, replace(long, teacher=None)))
    head = 20 * memory.CHUNK_ELEMENTS + 8 * 300 * 32
    assert more - less == 12 * 2 * 2**20 * 300 - head
    shared = memory.estimate(sizes, run, Mesh(fsdp=2))["teacher"]
    assert shared - need["teacher"] == pytest.approx((4 / 2 - 2) * total + 2 * total, rel=0.2)
