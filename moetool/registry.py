"""Every name that a user may type, and the code that it stands for.

This table is the map of the program: a new family, method, schedule, strategy or metric is a
function (or a spec) in the file named here, and one line. Help texts and error messages are made
from it. Nothing is imported until `load` is called. Names that are also words of config.json or
report.json (families, metrics) have `_`, the others `-`.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from moetool.errors import ConfigError

# What a metric of routing is measured on -> its names. Those of `load` are functions of RoutingStats, the others of a
# finished report.
METRICS: dict[str, dict[str, str]] = {
    "load": {
        "mri": "moetool.routing.load_metrics:mri",
        "mri_normalized": "moetool.routing.load_metrics:mri_normalized",
        "entropy": "moetool.routing.load_metrics:entropy",
        "cv": "moetool.routing.load_metrics:cv",
        "max_violation": "moetool.routing.load_metrics:max_violation",
        "dead_experts": "moetool.routing.load_metrics:dead_experts",
        "balance_loss": "moetool.routing.load_metrics:balance_loss",
        "balance_loss_hf": "moetool.routing.load_metrics:balance_loss_hf",
    },
    "text": {
        "coactivation_distance": "moetool.routing.report_metrics:coactivation_distance",
        "domain_divergence": "moetool.routing.report_metrics:domain_divergence",
        "vocabulary_specialization": "moetool.routing.report_metrics:vocabulary_specialization",
        "next_token_specialization": "moetool.routing.report_metrics:next_token_specialization",
    },
    "comparison": {
        "saturation": "moetool.routing.report_metrics:saturation",
        "mri_change": "moetool.routing.report_metrics:mri_change",
        "load_divergence": "moetool.routing.report_metrics:load_divergence",
        "continual_specialization": "moetool.routing.report_metrics:continual_specialization",
        "router_drift": "moetool.routing.report_metrics:router_drift",
        "expert_drift": "moetool.routing.report_metrics:expert_drift",
    },
    "upcycling": {
        "expert_similarity": "moetool.routing.report_metrics:expert_similarity",
        "dense_similarity": "moetool.routing.report_metrics:dense_similarity",
        "kept_similarity": "moetool.routing.report_metrics:kept_similarity",
        "unit_use": "moetool.routing.report_metrics:unit_use",
        "idle_units": "moetool.routing.report_metrics:idle_units",
    },
}

REGISTRY: dict[str, dict[str, str]] = {
    "target": {
        "mixtral": "moetool.arch.mixtral:SPEC",
        "qwen2_moe": "moetool.arch.qwen2_moe:SPEC",
        "qwen3_moe": "moetool.arch.qwen3_moe:SPEC",
        "flex_olmo": "moetool.arch.flex_olmo:SPEC",
        "granitemoe": "moetool.arch.granitemoe:SPEC",
        "qwen3_5_moe_text": "moetool.arch.qwen3_5_moe:SPEC",
        "granitemoehybrid": "moetool.arch.granitemoehybrid:SPEC",
        "granitemoe_swa": "moetool.arch.granitemoe_swa:SPEC",
        "ernie4_5_moe": "moetool.arch.ernie4_5_moe:SPEC",
        "cohere2_moe": "moetool.arch.cohere2_moe:SPEC",
        "lfm2_moe": "moetool.arch.lfm2_moe:SPEC",
        "hunyuan_v1_moe": "moetool.arch.hunyuan_v1_moe:SPEC",
        "glm4_moe": "moetool.arch.glm4_moe:SPEC",
        "dots1": "moetool.arch.dots1:SPEC",
        "solar_open": "moetool.arch.solar_open:SPEC",
    },
    "method": {
        "drop": "moetool.upcycle.init:drop",
        "copy": "moetool.upcycle.init:copy",
        "noise": "moetool.upcycle.init:noise",
        "scratch": "moetool.upcycle.init:scratch",
    },
    "operation": {
        "upcycle": "moetool.upcycle.plan:OPERATION",
        "convert": "moetool.convert.plan:OPERATION",
        "average": "moetool.average.plan:OPERATION",
        "grow": "moetool.grow.plan:OPERATION",
        "prune": "moetool.prune.plan:OPERATION",
        "densify": "moetool.densify.plan:OPERATION",
    },
    "score": {
        "weighted-ean": "moetool.prune.scores:weighted_ean",
        "ean": "moetool.prune.scores:ean",
        "frequency": "moetool.prune.scores:frequency",
        "reap": "moetool.prune.scores:reap",
        "man": "moetool.prune.scores:man",
        "msan": "moetool.prune.scores:msan",
    },
    "router": {
        "normal": "moetool.upcycle.router:normal",
        "uniform": "moetool.upcycle.router:uniform",
        "zeros": "moetool.upcycle.router:zeros",
        "orthogonal": "moetool.upcycle.router:orthogonal",
        "balanced": "moetool.upcycle.router:normal",
        "ridge": "moetool.upcycle.router:normal",
    },
    "schedule": {
        "cosine": "moetool.train.schedules:cosine",
        "infinite": "moetool.train.schedules:infinite",
        "wsd": "moetool.train.schedules:wsd",
        "constant": "moetool.train.schedules:constant",
    },
    "balance": {
        "aux": "moetool.train.balance:AUX",
        "global-aux": "moetool.train.balance:GLOBAL_AUX",
        "pooled-aux": "moetool.train.balance:POOLED_AUX",
        "seq-aux": "moetool.train.balance:SEQ_AUX",
        "adaptive-aux": "moetool.train.balance:AdaptiveAux",
        "z-loss": "moetool.train.balance:Z_LOSS",
        "sinkhorn": "moetool.train.selection:Sinkhorn",
        "loss-free": "moetool.train.selection:LossFree",
        "erc": "moetool.train.coupling:Erc",
        "none": "moetool.train.balance:NONE",
    },
    "metric": {name: path for scope in METRICS.values() for name, path in scope.items()},
    "suite": {
        "cpt-english": "moetool.evaluate.suites:CPT_ENGLISH",
        "cpt-german": "moetool.evaluate.suites:CPT_GERMAN",
        "cpt-code": "moetool.evaluate.suites:CPT_CODE",
        "drop-upcycling-english": "moetool.evaluate.suites:DROP_UPCYCLING_ENGLISH",
        "drop-upcycling-japanese": "moetool.evaluate.suites:DROP_UPCYCLING_JAPANESE",
    },
}


def names(kind: str) -> list[str]:
    """The names of a kind, in the order in which help texts list them."""
    return list(REGISTRY[kind])


def check(kind: str, name: str) -> str:
    """Return `name` if it is one of `kind`; else raise ConfigError with the nearest and all names."""
    if name in REGISTRY[kind]:
        return name
    near = suggest(name, REGISTRY[kind])
    raise ConfigError(f"unknown {kind} '{name}'{near}; choose from {', '.join(REGISTRY[kind])}")


def load(kind: str, name: str) -> Any:
    """Import the object that a name stands for.

    Raises:
        ConfigError: the name is unknown; the message suggests the nearest.
    """
    module, _, attribute = REGISTRY[kind][check(kind, name)].partition(":")
    return getattr(importlib.import_module(module), attribute)


def suggest(name: str, known: Any) -> str:
    """A clause such as `, did you mean 'cosine'?`, or nothing when no name is near."""
    near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
    return f", did you mean '{near[0]}'?" if near else ""
