"""What the planner makes of headers, without torch, is what cpt sees of the finished model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moetool import registry
from moetool.arch.dense_families import DENSE
from moetool.budget.shapes import plan_models
from moetool.checkpoint.reader import CheckpointReader
from moetool.cost.memory import Training, estimate, loading_bytes, saving_bytes
from moetool.cost.operations import flops_per_token
from moetool.cost.parameters import Sizes, pattern, sizes_of
from moetool.cost.traffic import step_traffic
from moetool.errors import CheckpointError, ConfigError
from moetool.mesh import Mesh
from moetool.recipe import UpcycleRecipe
from tests import tiny
from tests.integration.test_upcycle_families import PAIRS, SPECS, make

RUN = Training(64, 2, "bf16", gradient_checkpointing=True)
MESHES = (Mesh(), Mesh(replicas=4), Mesh(fsdp=4), Mesh(fsdp=2, ep=2), Mesh(fsdp=2, tp=2), Mesh(2, 4, 2, 2))


def named(plan: Any, shapes: Any) -> dict[str, str]:
    """A plan, as far as it names what a model has."""
    there = set()
    for name in shapes:
        while name:
            there.add(pattern(name))
            name = name.rpartition(".")[0]
    return {name: style for name, style in plan.items() if name in there}


def compare(ours: Sizes, model: Any) -> None:
    theirs = sizes_of(model)
    assert dict(ours.shapes) == dict(theirs.shapes)
    for name in (
        "family", "hidden_size", "vocab_size", "num_layers", "num_heads", "num_key_value_heads", "head_dim",
        "num_experts", "top_k", "tied", "changes_logits",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.exact) == list(theirs.exact)
    assert list(ours.frozen) == list(theirs.frozen)
    assert ours.routers == theirs.routers
    assert set(ours.spread) == set(named(dict.fromkeys(theirs.spread, ""), ours.shapes))
    for plan in ("tp_plan", "fsdp_plan"):
        assert named(getattr(ours, plan), ours.shapes) == named(getattr(theirs, plan), ours.shapes), plan
    assert flops_per_token(ours, 64) == flops_per_token(theirs, 64)
    for mesh in MESHES:
        if mesh.ep > 1 and ours.num_experts == 1:
            continue
        assert estimate(ours, RUN, mesh) == estimate(theirs, RUN, mesh), mesh
        assert loading_bytes(ours, mesh, True) == loading_bytes(theirs, mesh, True)
        # Collectives of a kind, whatever their order.
        sent = [sorted(map(str, step_traffic(one, mesh, RUN, 3))) for one in (ours, theirs)]
        assert sent[0] == sent[1], mesh
    assert saving_bytes(ours, RUN, 4) == saving_bytes(theirs, RUN, 4)


def skeleton(config: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_cost_and_memory_of_every_pair_are_cpts_own(pair: tuple[str, str], tmp_path: Path) -> None:
    from moetool.upcycle.plan import plan_upcycling

    reader = CheckpointReader(make(pair, tmp_path / "dense"))
    recipe = UpcycleRecipe(target=pair[1], num_experts=4)
    models = plan_models(reader, recipe)
    upcycling = plan_upcycling([reader], recipe.settled(1), 10**9)
    assert models.recipe.shared_experts == upcycling.recipe.shared_experts
    assert models.num_bytes == upcycling.plan.num_bytes - _padding(upcycling.plan)
    compare(models.moe, skeleton(dict(upcycling.plan.config)))


def _padding(plan: Any) -> int:
    return int(plan.num_bytes - sum(tensor.size for tensor in plan.tensors))


@pytest.mark.parametrize("family", [name for name in DENSE if name in tiny.DENSE])
def test_so_are_those_of_every_dense_family(family: str, tmp_path: Path) -> None:
    from moetool.checkpoint.model import skeleton

    folder = tiny.save_dense(family, tmp_path / "dense")
    compare(plan_models(CheckpointReader(folder), UpcycleRecipe(num_experts=4)).dense, skeleton(folder))


@pytest.mark.parametrize("pair", [("qwen3", "glm4_moe"), ("qwen3", "qwen3_moe"), ("llama", "mixtral")], ids="-".join)
def test_granularity_shared_experts_and_dense_layers(pair: tuple[str, str], tmp_path: Path) -> None:
    from moetool.upcycle.plan import plan_upcycling

    reader = CheckpointReader(make(pair, tmp_path / "dense"))
    more: dict[str, Any] = {"moe_layers": "1-"} if SPECS[pair[1]].moe_layers else {}
    more |= {"shared_experts": 1} if SPECS[pair[1]].shared else {}
    group = 2 - more.get("shared_experts", 0)
    recipe = UpcycleRecipe(target=pair[1], num_experts=8, top_k=2 * group, granularity=2, **more)
    compare(plan_models(reader, recipe).moe, skeleton(dict(plan_upcycling([reader], recipe, 10**9).plan.config)))


def test_every_target_has_a_plan_that_transformers_has_too() -> None:
    from moetool.arch.sharing import TENSOR_PARALLEL

    assert set(TENSOR_PARALLEL) <= {*registry.names("target"), *DENSE}


def test_a_family_that_cannot_be_upcycled_still_has_cost_and_memory(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=300, head_dim=8, num_key_value_heads=2, **sizes)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    models = plan_models(CheckpointReader(tmp_path / "gemma"), UpcycleRecipe(num_experts=4, granularity=2, top_k=4))
    assert "it scales embeddings and its norms multiply by 1 + weight" in models.unfit
    from moetool.checkpoint.model import skeleton

    dense = sizes_of(skeleton(tmp_path / "gemma"))
    for mesh in (Mesh(), Mesh(fsdp=4)):
        assert estimate(models.dense, RUN, mesh) == estimate(dense, RUN, mesh)
    assert flops_per_token(models.dense, 64) == flops_per_token(dense, 64)
    # Half-sized experts: two of them are an FFN, so that 4 are two, beside routers of 4 x 32.
    ffn = 2 * 3 * 32 * 64
    assert models.moe.total == models.dense.total + ffn + 2 * 3 * 4 * 32 - 2 * 2 * 4 * 32
    assert models.moe.active == models.moe.total


def test_what_is_no_dense_model_is_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already a Mixture of Experts"):
        plan_models(CheckpointReader(mixtral), UpcycleRecipe())
    folder = tiny.save_dense("llama", tmp_path / "dense")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(CheckpointError, match="has no hidden_size"):
        plan_models(CheckpointReader(folder), UpcycleRecipe())
