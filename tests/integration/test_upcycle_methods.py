"""What each method, granularity, shared expert and donor writes, against a whole-matrix reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moetool import registry
from moetool.recipe import UpcycleRecipe
from moetool.surgery import fill
from moetool.units import permutation, redrawn_units
from tests import tiny

P = ("gate", "up", "down")


def upcycle(*arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("upcycle", *arguments, "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def refused(*arguments: object, code: int = 1) -> str:
    found, _, err = tiny.in_process("upcycle", *arguments)
    assert found == code, err
    assert "Traceback" not in err
    return " ".join(err.split())


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    found: Tensor = model.eval()(torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))).logits
    return found


def expert(target: str, tensors: dict[str, Tensor], layer: int, number: int, projection: str) -> Tensor:
    """One expert's matrix out of a checkpoint, whatever its layout."""
    spec = registry.load("target", target)
    tensor = tensors[spec.experts[projection].format(layer=layer, expert=number)]
    if not spec.fused:
        return tensor
    if projection == "down":
        return tensor[number]
    gate, up = tensor[number].chunk(2)
    return gate if projection == "gate" else up


def check_experts(document: dict[str, Any], donors: list[Path], out: Path) -> None:
    """Every expert against the whole-matrix form: source units x factor, rounded once, where unchanged."""
    recipe = UpcycleRecipe.from_json(document["recipe"])
    spec, made = registry.load("target", recipe.target), weights(out)
    dense = [weights(folder) for folder in donors]
    parts, shared = recipe.granularity, recipe.shared_experts or 0
    group = parts - shared if shared < parts else parts
    factor = {0: parts}.get(shared, group if shared < parts else parts / 2)
    for layer in document["moe_layers"]:
        for number in range(recipe.num_experts):
            whole = dense[number // (recipe.num_experts // len(donors))]
            size = whole["model.layers.0.mlp.gate_proj.weight"].shape[0] // parts
            first = ((shared if shared < parts else 0) + number % group) * size
            sets = []
            for projection in P:
                matrix = whole[f"model.layers.{layer}.mlp.{projection}_proj.weight"]
                unit_rows = (matrix.T if projection == "down" else matrix)[first : first + size]
                order = permutation(recipe, layer, number, size)
                unit_rows = unit_rows if order is None else unit_rows[order]
                if projection == "down" and not spec.scaling_key:
                    unit_rows = (unit_rows.double() * factor).to(made["model.norm.weight"].dtype)
                found = expert(recipe.target, made, layer, number, projection)
                found = found.T if projection == "down" else found
                units = redrawn_units(recipe, layer, number, projection, size)
                kept = torch.ones(size, dtype=torch.bool)
                kept[units] = False
                assert torch.equal(found[kept], unit_rows[kept].to(found.dtype))
                assert bool((found[units] != unit_rows[units]).any(1).all())
                sets.append(tuple(units.tolist()))
            if recipe.drop_index == "shared":
                assert len(set(sets)) == 1


COMBINATIONS = [
    ("llama", "mixtral", "--granularity 4 --num-experts 8 --top-k 4"),
    ("llama", "granitemoe", "--granularity 2 --num-experts 4 --drop-index per-matrix"),
    ("granite", "granitemoe", "--method noise --num-experts 4"),
    ("qwen2", "qwen2_moe", "--granularity 4 --shared-experts 1 --num-experts 6 --top-k 3"),
    ("qwen2", "qwen2_moe", "--num-experts 4 --shared-experts 2"),
    ("llama", "glm4_moe", "--granularity 4 --shared-experts 4 --num-experts 8 --top-k 4 --moe-layers 1-"),
    ("qwen3", "glm4_moe", "--granularity 8 --shared-experts 2 --num-experts 12 --top-k 6 --drop-ratio 0.3"),
    ("ernie4_5", "ernie4_5_moe", "--granularity 2 --shared-experts 2 --num-experts 4 --moe-layers every:2"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "--granularity 4 --num-experts 6 --top-k 3"),
    ("cohere2", "cohere2_moe", "--granularity 2 --num-experts 4 --method noise --drop-index per-matrix"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "target", "options"), COMBINATIONS, ids=[c[2].replace("--", "") for c in COMBINATIONS]
)
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_experts_are_the_source_where_unchanged(
    family: str, target: str, options: str, dtype: torch.dtype, block: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", block)  # blocks of a few rows: the seams must not show
    dense = tiny.save_dense(family, tmp_path / "dense", dtype=dtype)
    document = upcycle(dense, tmp_path / "moe", "--target", target, *options.split(), "--verify", "full")
    check_experts(document, [dense], tmp_path / "moe")
    assert document["proof"]["redrawn_units"] == (
        document["redrawn_units"]["per_expert"] * document["recipe"]["num_experts"] * len(document["moe_layers"])
    )


@pytest.mark.parametrize("family,target", [("llama", "mixtral"), ("llama", "granitemoe"), ("llama", "glm4_moe")])  # noqa: PT006
def test_workers_and_shards_do_not_change_a_tensor(family: str, target: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fill, "BLOCK_ELEMENTS", 300)
    dense = tiny.save_dense(family, tmp_path / "dense")
    donor = tiny.save_dense(family, tmp_path / "donor", seed=1)
    found = []
    for workers, shard in ((1, "5GB"), (4, "20KB"), (3, "1KB")):
        out = tmp_path / f"moe{workers}"
        options = ("--granularity", 2, "--shared-experts", int(target == "glm4_moe"), "--max-shard-size", shard)
        upcycle(dense, out, "--target", target, "--donor", donor, "--workers", workers, *options)
        found.append(weights(out))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


def test_noise_is_relative_to_each_matrix_or_absolute(tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "dense", intermediate_size=256)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 30
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    for options, stds in (
        (("--noise-scale", "0.5"), [0.5 * 0.2, 0.5 * 6.0, 0.5 * 0.2]),
        (("--noise-std", "0.02"), [0.02, 0.02, 0.02]),
    ):
        out = tmp_path / options[0]
        document = upcycle(dense, out, "--method", "noise", "--noise-ratio", "0.25", *options, "--verify", "full")
        assert document["redrawn_units"]["per_expert"] == 64
        made = weights(out)
        for projection, std in zip(P, stds, strict=True):
            before = tensors[f"model.layers.0.mlp.{projection}_proj.weight"]
            for number in range(8):
                change = expert("mixtral", made, 0, number, projection) - before
                units = (change != 0).any(0 if projection == "down" else 1)
                assert int(units.sum()) == 64
                change = change[:, units] if projection == "down" else change[units]
                # 64 units x 32 entries: standard errors of std / sqrt(n) and std / sqrt(2n).
                n = change.numel()
                assert abs(float(change.mean())) < 5 * std / n**0.5
                assert float(change.std()) == pytest.approx(std, rel=5 / (2 * n) ** 0.5 + 0.02)


def test_noise_below_the_resolution_of_the_dtype_proves(tmp_path: Path) -> None:
    dense = tiny.save_dense("llama", tmp_path / "dense", dtype=torch.bfloat16)
    for scale in ("0", "0.00001", "0.003", "0.1", "30"):
        upcycle(dense, tmp_path / scale, "--method", "noise", "--noise-scale", scale, "--verify", "full")


def test_scratch_is_the_familys_own_initialisation(tmp_path: Path) -> None:
    for family, target in (
        ("llama", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("llama", "glm4_moe"),
        ("granite", "granitemoe"),
    ):
        dense = tiny.save_dense(family, tmp_path / family, initializer_range=0.05, hidden_size=64)
        out = tmp_path / target
        document = upcycle(
            dense, out, "--target", target, "--method", "scratch", "--verify", "full", "--num-experts", 4
        )
        made = weights(out)
        torch.manual_seed(0)
        fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
        fresh.save_pretrained(tmp_path / "fresh")
        expected = weights(tmp_path / "fresh")
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert made[name].shape == tensor.shape, name
            assert float(made[name].std()) == pytest.approx(float(tensor.std()), rel=0.2, abs=1e-6), name
            assert float(made[name].mean()) == pytest.approx(float(tensor.mean()), abs=0.02), name
        assert not made["model.embed_tokens.weight"][0].any()  # the padding token's row
        assert len({float(t.flatten()[1]) for t in made.values() if t.ndim > 1 and t.any()}) == sum(
            t.ndim > 1 and bool(t.any()) for t in made.values()
        ), "two tensors share a draw"
        assert document["recipe"]["num_donors"] == 1


def test_donors_give_experts_and_all_else_is_their_mean(tmp_path: Path) -> None:
    folders = [tiny.save_llama(tmp_path / f"dense{i}", seed=i, dtype=torch.bfloat16) for i in range(3)]
    others = [word for folder in folders[1:] for word in ("--donor", folder)]
    out = tmp_path / "moe"
    document = upcycle(folders[0], out, *others, "--num-experts", 6, "--drop-ratio", "0.25", "--verify", "full")
    check_experts(document, folders, out)
    dense, made = [weights(folder) for folder in folders], weights(out)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        mean = sum((tensors[name].float() for tensors in dense[1:]), dense[0][name].float()) / 3
        assert torch.equal(made[name], mean.to(torch.bfloat16))
    entry = json.loads((out / "moetool.json").read_text())["lineage"][0]
    assert [one["name"] for one in entry["donors"]] == [str(folder) for folder in folders[1:]]
    code, printed, err = tiny.in_process("verify", out)
    assert code == 0, err
    code, printed, _ = tiny.in_process("inspect", out)
    assert " and ".join(str(folder) for folder in folders)[:30] in " ".join(printed.split())
    # A donor that is not the one that was used does not prove.
    code, _, err = tiny.in_process("verify", out, "--donor", folders[2], "--donor", folders[1])
    assert code == 1
    assert "is not the file that was upcycled" in err


def test_the_same_donor_many_times_is_the_dense_model(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", "--donor", dense, "--donor", dense, "--donor", dense, "--drop-ratio", 0)
    assert (logits(tmp_path / "moe") - logits(dense)).abs().max() < 1e-5


def test_donors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    wide = tiny.save_llama(tmp_path / "wide", intermediate_size=96)
    out = tmp_path / "moe"
    assert "intermediate_size is 96" in refused(dense, out, "--donor", wide)
    assert "rms_norm_eps is 0.5" in refused(dense, out, "--donor", tiny.save_llama(tmp_path / "eps", rms_norm_eps=0.5))
    assert "is a qwen2" in refused(dense, out, "--donor", tiny.save_dense("qwen2", tmp_path / "qwen2"))
    foreign = tiny.save_llama(tmp_path / "foreign")
    tiny.save_tokenizer(foreign, vocab_size=280)
    assert "its tokenizer.json differs from that of" in refused(dense, out, "--donor", foreign)
    other = tiny.save_llama(tmp_path / "other")
    told = refused(dense, out, "--donor", other, "--donor", other)
    assert "not a multiple of 3 (each of 3 donors provides the same number); choose from 3, 6, 9" in told
    ruined = tiny.save_llama(tmp_path / "ruined", seed=3)
    tensors = load_file(ruined / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, ruined / "model.safetensors", metadata={"format": "pt"})
    assert f"{ruined}/model.safetensors: tensor model.norm.weight holds NaN" in refused(dense, out, "--donor", ruined)
    inside = dense / "inside"
    assert "is the source or inside it" in refused(other, inside, "--donor", dense)
    assert not inside.exists()


@pytest.mark.parametrize(
    ("target", "options", "told"),
    [
        ("mixtral", "--granularity 3", "does not divide the intermediate size 64; choose from 1, 2, 4, 8, 16, 32, 64"),
        ("mixtral", "--granularity 4 --num-experts 10 --top-k 4", "not a multiple of 4 (4 experts together"),
        ("mixtral", "--granularity 4 --num-experts 8 --top-k 6", "--top-k 6 is not a multiple of 4"),
        ("mixtral", "--granularity 2 --router zeros", "choose from normal, uniform, orthogonal"),
        ("mixtral", "--granularity 2 --router-std 0", "ties all groups"),
        ("mixtral", "--shared-experts 1", "has no shared experts"),
        ("mixtral", "--moe-layers 1-", "choose a --target that can: qwen2_moe"),
        ("qwen2_moe", "--moe-layers 7", "is not a range within layers 0-1"),
        ("qwen2_moe", "--moe-layers first", "give all, every:2, or layers such as"),
        ("qwen2_moe", "--moe-layers every:3", "names none of the 2 layers"),
        ("glm4_moe", "--granularity 4 --shared-experts 6", "choose from 0, 1, 2, 3, 4, 8, 12, 16"),
        ("glm4_moe", "--granularity 4 --num-experts 8 --top-k 3", "is not a multiple of 3"),
        ("mixtral", "--drop-ratio 1.5", "is not between 0 and 1"),
    ],
)
def test_what_does_not_divide_or_fit_is_refused_with_what_does(
    target: str, options: str, told: str, llama: Path, tmp_path: Path
) -> None:
    code = 2 if "drop-ratio" in options else 1
    assert told in refused(llama, tmp_path / "moe", "--target", target, *options.split(), code=code)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--method copy --drop-ratio 0.5",
        "--method drop --noise-std 0.1",
        "--method noise --drop-ratio 0.5",
        "--method scratch --router uniform",
        "--method scratch --donor x",
        "--method noise --noise-std 0.1 --noise-scale 2",
    ],
)
def test_options_that_a_method_does_not_read_are_usage_errors(options: str, llama: Path, tmp_path: Path) -> None:
    told = refused(llama, tmp_path / "moe", *options.split(), code=2)
    assert "has no effect with" in told or "not both" in told


def test_a_zeros_router_and_a_single_group_are_warned_of(llama: Path, tmp_path: Path) -> None:
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "a", "--router", "zeros")
    assert code == 0
    assert "same first experts" in " ".join(err.split())
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "b", "--granularity", 4, "--top-k", 4)
    assert code == 0
    assert "gives every chosen group of experts the same weight" in " ".join(err.split())


def test_groups_that_tie_in_bf16_are_told(tmp_path: Path) -> None:
    shares = {}
    for target in ("mixtral", "glm4_moe"):
        for dtype in (torch.bfloat16, torch.float32):
            dense = tiny.save_dense("llama", tmp_path / f"{target}{dtype}", dtype=dtype, hidden_size=64)
            options = ("--granularity", 2, "--shared-experts", 0, "--num-experts", 64, "--top-k", 8)
            out = tmp_path / f"{target}{dtype}moe"
            shares[target, dtype] = upcycle(dense, out, "--target", target, *options)["proof"]["split_groups"]
    assert shares["glm4_moe", torch.bfloat16] == 0  # its router computes in fp32
    assert shares["mixtral", torch.float32] == 0
    assert 0.001 < shares["mixtral", torch.bfloat16] < 0.2


def test_a_plan_says_what_it_costs(llama: Path, tmp_path: Path) -> None:
    plan = upcycle(llama, tmp_path / "moe", "--granularity", 4, "--num-experts", 8, "--top-k", 4, "--plan")
    # hidden 32, 2 layers, intermediate 64, vocabulary 300, 4 heads of 8, 2 of them for keys and values.
    attention = 32 * 32 * 2 + 32 * 16 * 2
    head = 300 * 32
    assert plan["flops_per_token"]["dense"] == 2 * (2 * (attention + 3 * 32 * 64) + head)
    assert plan["flops_per_token"]["moe"] == 2 * (2 * (attention + 3 * 32 * 64 + 8 * 32) + head)  # + the router
    assert plan["redrawn_units"] == {"per_expert": 8, "of": 16, "common": 0.25}
    norms = 2 * 2 * 32 + 32
    experts = 2 * 8 * 3 * 32 * 16
    assert plan["parameters"]["total"] == 2 * head + 2 * attention + norms + experts + 2 * 8 * 32
    assert plan["parameters"]["active"] == plan["parameters"]["total"] - experts // 2
    assert plan["peak_memory_bytes"] > 280e6
    per_matrix = upcycle(llama, tmp_path / "moe", "--drop-index", "per-matrix", "--plan")
    assert per_matrix["redrawn_units"]["common"] == pytest.approx(0.5**6)


def test_a_killed_run_of_every_kind_is_finished_to_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    from moetool.checkpoint.writer import CheckpointWriter

    dense = tiny.save_dense("llama", tmp_path / "dense")
    donor = tiny.save_dense("llama", tmp_path / "donor", seed=1)
    for number, options in enumerate(
        [
            ("--target", "granitemoe", "--granularity", 2),
            ("--target", "glm4_moe", "--donor", donor),
            ("--method", "scratch", "--target", "qwen2_moe"),
        ]
    ):
        whole, cut = tmp_path / f"whole{number}", tmp_path / f"cut{number}"
        common = (*options, "--max-shard-size", "15KB", "--verify", "full")
        upcycle(dense, whole, *common)
        closed = []

        def close(self: Any, shard: Any, digest: str, original: Any = CheckpointWriter.close) -> None:
            closed.append(shard.name)  # noqa: B023
            if len(closed) > 3:  # noqa: B023
                raise KeyboardInterrupt
            original(self, shard, digest)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointWriter, "close", close)
            code, _, _ = tiny.in_process("upcycle", dense, cut, *common)
        assert code == 130
        assert not (cut / "config.json").exists()
        upcycle(dense, cut, *common)
        for path in whole.glob("*.safetensors"):
            assert path.read_bytes() == (cut / path.name).read_bytes()
        shutil.rmtree(cut)
