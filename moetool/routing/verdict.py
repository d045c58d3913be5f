"""A report's numbers in plain words: balanced, skewed or collapsed.

A layer is judged on all domains together, since an expert that only code uses is a specialist, not a
fault. levels.py says what each word means.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moetool.routing.levels import BALANCED_MRI_NORMALIZED, DEAD_LOAD, level_of_load


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """Judge a report (see `report.build_report`) by its domains alone.

    Returns:
        `level` (balanced, skewed or collapsed: that of the worst layer), `title` (one sentence),
        `findings` and `advice` (sentences), `layers` (one level per layer), `worst` (domain, layer, mri,
        mri_normalized) and `dead_experts` ([layer, expert] pairs that are dead in every domain).
    """
    layers = [row["layer"] for row in next(iter(report["domains"].values()))["layers"]]
    load_LE = _pooled_load(report)
    levels = [level_of_load(load_E.tolist(), report["top_k"]) for load_E in load_LE]
    dead = [[layers[row], int(e)] for row, e in zip(*np.nonzero(_dead_in_all(report)), strict=True)]
    worst = _worst(report)
    level = next(name for name in ("collapsed", "skewed", "balanced") if name in levels)
    return {
        "level": level,
        "title": _title(level, levels, len(report["domains"])),
        "findings": _findings(report, level, worst, dead),
        "advice": _advice(level, dead, report),
        "layers": levels,
        "worst": worst,
        "dead_experts": dead,
    }


def _pooled_load(report: dict[str, Any]) -> Any:
    domains = report["domains"].values()
    weights = [domain["num_tokens"] for domain in domains]
    loads_NLE = np.array([[row["load"] for row in domain["layers"]] for domain in domains])
    return np.average(loads_NLE, axis=0, weights=weights)


def _dead_in_all(report: dict[str, Any]) -> Any:
    E = report["num_experts"]
    return np.all(
        [
            [[expert in row["dead_experts"] for expert in range(E)] for row in domain["layers"]]
            for domain in report["domains"].values()
        ],
        axis=0,
    )


def _worst(report: dict[str, Any]) -> dict[str, Any]:
    places = ((name, row) for name, domain in report["domains"].items() for row in domain["layers"])
    name, row = max(places, key=lambda place: place[1]["mri"])
    expert = int(np.argmax(row["load"]))
    keep = ("layer", "mri", "mri_normalized", "entropy")
    return {"domain": name, "expert": expert} | {key: row[key] for key in keep}


def _title(level: str, levels: list[str], num_domains: int) -> str:
    over = "over all domains together, " if num_domains > 1 else ""
    here = levels.count(level)
    of = f"{here} of {len(levels)} layers" if len(levels) > 1 else "the one layer"
    one = here == 1
    if level == "balanced":
        return f"Balanced: {over}every layer spreads its tokens over all its experts."
    if level == "skewed":
        return f"Skewed: {over}{of} {'prefers' if one else 'prefer'} some experts clearly."
    return f"Collapsed: {over}{of} {'sends' if one else 'send'} most tokens to a few experts."


def _findings(report: dict[str, Any], level: str, worst: dict[str, Any], dead: list[list[int]]) -> list[str]:
    balanced = report["top_k"] / report["num_experts"]
    findings = [
        f"The busiest expert is expert {worst['expert']} of layer {worst['layer']}: it receives {worst['mri']:.0%}"
        f" of the tokens of {worst['domain']}, where balance would give {balanced:.0%}"
        f" ({worst['mri_normalized']:.1f} times the balanced load)."
    ]
    if level == "balanced" and worst["mri_normalized"] > BALANCED_MRI_NORMALIZED:
        findings.append(
            "This is specialisation, because over all domains together no expert has such a load. If only one kind of"
            " text is served, that expert still limits the speed."
        )
    total = report["num_experts"] * report["num_layers"]
    where = "in every domain" if len(report["domains"]) > 1 else f"on {worst['domain']}"
    if dead:
        layers = len({layer for layer, _ in dead})
        findings.append(
            f"{len(dead)} of {total} experts {'is' if len(dead) == 1 else 'are'} dead {where}, in {layers}"
            f" layer{'' if layers == 1 else 's'}: less than {DEAD_LOAD:.0%} of a fair share of tokens."
        )
    else:
        findings.append(f"No expert is dead {where}{_dead_on_one(report)}.")
    return findings


def _dead_on_one(report: dict[str, Any]) -> str:
    """The experts that single domains leave unused, where there are several domains."""
    if len(report["domains"]) == 1:
        return ""
    counts = {
        name: sum(len(row["dead_experts"]) for row in domain["layers"]) for name, domain in report["domains"].items()
    }
    parts = [f"{count} on {name}" for name, count in counts.items() if count]
    return f"; dead on one kind of text: {', '.join(parts)}" if parts else ""


def _advice(level: str, dead: list[list[int]], report: dict[str, Any]) -> list[str]:
    if level == "balanced":
        return ["Nothing needs to be done. Keep the balance loss that this checkpoint was trained with."]
    advice = []
    if level == "collapsed":
        advice.append(
            "Continue pretraining with a balance loss per layer (moetool cpt --balance aux=0.01), because a loss"
            " pooled over the layers can be low while single layers collapse."
        )
        advice.append(
            "If the model was upcycled by copying, its experts started identical and may not diverge; upcycle again"
            " with --method drop --drop-ratio 0.5."
        )
    else:
        advice.append(
            "If this model will be trained further, keep a balance loss on each layer, and raise its coefficient if"
            " the skew grows. In inference with experts on different devices, the busiest expert limits the speed."
        )
    if dead:
        advice.append(
            "Dead experts only cost memory. Before you prune them, check whether they are used on text of other"
            " domains."
        )
    if len(report["domains"]) == 1:
        advice.append(
            "Only one domain was analysed; a skew on one kind of text may be specialisation. Add domains with --data."
        )
    return advice
