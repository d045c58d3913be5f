"""Virtual groups of experts: how often scores that tie split a group.

Shapes: T tokens, D hidden, E experts, K top-k, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moetool.arch.spec import ArchSpec
from moetool.checkpoint.reader import BlockFile
from moetool.recipe import UpcycleRecipe, generator
from moetool.surgery.fill import Fill
from moetool.surgery.plan import Plan
from moetool.surgery.rows import read_rows

NUM_TOKENS = 1024  # a layer
NORMS = ("post_attention_layernorm", "input_layernorm", "ffn_norm")  # names of the norm before the FFN


# ArchSpec.ranked_by -> the scores of which the largest are chosen, from the logits.
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logits": torch.Tensor.float,
    "softmax": lambda logits_TE: logits_TE.float().softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.float().sigmoid(),
}


def split_share(recipe: UpcycleRecipe, spec: ArchSpec, plan: Plan, written: BlockFile) -> float:
    """Share of tokens for which the top-k takes only a part of some group, over all MoE layers.

    The experts of a group have the same row in the router, so whole groups are chosen, unless two
    groups' scores are equal. A router that computes in bf16 rounds logits to 8 bits; the sigmoid of
    a logit above 17 is 1 in fp32. Tokens are normal random vectors times the weight of the norm
    before the FFN.
    """
    group = recipe.group_size
    routers = [fill for fill in plan.model_fills if fill.kind == "router"]
    if group == 1 or not routers:  # from scratch, a router is drawn like any matrix
        return 0.0
    split = 0
    for fill in routers:
        rows_ED = read_rows(written, plan.place_info(fill, fill.places[0]), 0, fill.shape[0])
        draw = generator(recipe.seed, "tokens", fill.layer or 0)
        tokens_TD = torch.randn(NUM_TOKENS, fill.shape[1], generator=draw) * _norm_D(plan, written, fill)
        dtype = torch.float32 if spec.router_fp32 else rows_ED.dtype
        logits_TE = torch.nn.functional.linear(tokens_TD.to(rows_ED.dtype).to(dtype), rows_ED.to(dtype))
        scores_TE = SCORES[spec.ranked_by](logits_TE)
        if spec.selection_bias:
            info = plan.written[spec.selection_bias.format(layer=fill.layer)]
            scores_TE = scores_TE + read_rows(written, info, 0, info.shape[0]).reshape(1, -1)
        chosen_TK = scores_TE.topk(recipe.top_k, dim=-1).indices // group
        counts_TG = torch.zeros(NUM_TOKENS, recipe.num_experts // group, dtype=torch.int32)
        counts_TG.scatter_add_(1, chosen_TK, torch.ones_like(chosen_TK, dtype=torch.int32))
        split += int(((counts_TG != 0) & (counts_TG != group)).any(-1).sum())
    return split / (NUM_TOKENS * len(routers))


def _norm_D(plan: Plan, written: BlockFile, fill: Fill) -> torch.Tensor:
    """The weight of the norm before the FFN; ones where the family has its norms after it."""
    prefix = f"model.layers.{fill.layer}"
    if f"{prefix}.post_feedforward_layernorm.weight" in plan.written:
        return torch.ones(fill.shape[1])
    name = next(name for norm in NORMS if (name := f"{prefix}.{norm}.weight") in plan.written)
    return read_rows(written, plan.written[name], 0, fill.shape[1]).float().flatten()
