"""Study: does Drop-Upcycling do, small, what its paper says? See drop-upcycling.md.

python docs/studies/drop_upcycling.py FOLDER --text en=EN.txt --text code=CODE.txt --text ja=JA.txt
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from study import Study, by_seed, figure, mean, options, spread, texts

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DENSE_TOKENS, DONOR_TOKENS, TOKENS = 1.6e6, 0.2e6, 0.8e6
# The paper's runs had Hugging Face's coefficient 0.02, pooled over the layers; at top-2 that is 0.04 here.
BALANCE = {"per layer": "aux=0.04", "pooled": "pooled-aux=0.04"}
ROUTER = ("--router", "uniform")
# name -> options of `moetool upcycle`; every one is trained alike.
METHODS: dict[str, tuple[str, ...]] = {
    "copy (r = 0)": ("--method", "copy"),
    "drop 0.1": ("--drop-ratio", "0.1"),
    "drop 0.25": ("--drop-ratio", "0.25"),
    "drop 0.5": ("--drop-ratio", "0.5"),
    "drop 0.75": ("--drop-ratio", "0.75"),
    "drop 1.0": ("--drop-ratio", "1.0"),
    "drop 0.5, per-matrix": ("--drop-ratio", "0.5", "--drop-index", "per-matrix"),
    "noise 0.5": ("--method", "noise", "--noise-ratio", "0.5"),
    "Branch-Train-MiX": ("--method", "copy"),
    "scratch": ("--method", "scratch"),
}
COPY = "copy (r = 0), per layer"
POOLED = ("copy (r = 0)", "drop 0.5")
RATIOS = {"copy (r = 0)": 0.0, "drop 0.1": 0.1, "drop 0.25": 0.25, "drop 0.5": 0.5, "drop 0.75": 0.75, "drop 1.0": 1.0}
HERE = Path(__file__).parent / "results"

Results = dict[int, dict[str, Any]]  # of each seed, by run


def slug(name: str) -> str:
    """A folder's name."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in name).strip("-").lower()


def seed_runs(study: Study, seed: int) -> dict[str, Any]:
    """All runs of one seed; losses over tokens and routing of each."""
    rate = ("--lr", "2e-3", "--seed", seed)
    dense = study.cpt(
        study.initial(seed), f"s{seed}/dense", DENSE_TOKENS, "--lr", "3e-3", "--seed", seed, train=("en", "code")
    )
    found: dict[str, Any] = {"dense": study.losses(dense)[-1][1]}
    for name, method in METHODS.items():
        words: list[object] = [*method, "--seed", seed, *(ROUTER if name != "scratch" else ())]
        if name == "Branch-Train-MiX":
            for domain in study.domains:  # the dense model itself is the first of four donors
                donor = study.cpt(dense, f"s{seed}/donor-{domain}", DONOR_TOKENS, *rate, train=(domain,))
                words += ["--donor", donor]
        moe = study.upcycle(dense, f"s{seed}/{slug(name)}", *words)
        for balance, strategy in BALANCE.items():
            if balance == "pooled" and name not in POOLED:
                continue
            run = f"s{seed}/{slug(name)}-{slug(balance)}"
            study.cpt(moe, run, TOKENS, *rate, "--balance", strategy, train=study.domains)
            found[f"{name}, {balance}"] = outcome(study, run)
    return found


def outcome(study: Study, run: str) -> dict[str, Any]:
    """Losses over tokens and routing of a finished run."""
    report = study.analyze(run, f"{run}-routing")
    return {
        "losses": study.losses(run),
        "load": {domain: [layer["load"] for layer in part["layers"]] for domain, part in report["domains"].items()},
        "divergence": mean(pair["mean"] for pair in report["domain_divergence"]),
        "similarity": report["upcycling"]["mean"]["between_experts"]["all"],
    }


def final(found: dict[str, Any], name: str) -> float:
    """Mean validation loss over the domains at the end."""
    return mean(found[name]["losses"][-1][1].values())


def curve(results: Results, name: str) -> tuple[list[float], list[float]]:
    """Million tokens, and the loss as a mean of domains and seeds."""
    runs = [found[name]["losses"] for found in results.values() if name in found]
    return (
        [tokens / 1e6 for tokens, _ in runs[0]],
        [mean(mean(run[i][1].values()) for run in runs) for i in range(len(runs[0]))],
    )


def draw_losses(results: Results) -> None:
    """The loss over tokens: ways of making the experts, and ratios (the paper's Figure 3)."""
    made, (ways, ratios) = figure(HERE / "drop-upcycling-loss.png", columns=2, width=10.0)
    for name in METHODS:
        x, y = curve(results, f"{name}, per layer")
        if name not in RATIOS or name in POOLED:
            ways.plot(x, y, "o-", markersize=3, label=name)
        if name in RATIOS or name == "scratch":
            ratios.plot(x, y, "o-", markersize=3, label=name)
    for axes in (ways, ratios):
        axes.set(xlabel="million tokens after upcycling", ylabel="validation loss, mean of three domains")
        axes.set_xlim(left=0.1)  # what follows the first evaluation; before it scratch is far above
        axes.set_ylim(top=6.2)
        axes.legend(fontsize=7)
    made.savefig(HERE / "drop-upcycling-loss.png")


def draw_ratios(results: Results) -> None:
    """Differences from ratio 0, a line a seed: the final loss over the ratio; ratio 0.5 over tokens."""
    made, (axes, time) = figure(HERE / "drop-upcycling-ratio.png", columns=2, width=10.0)
    lines = []
    for seed, found in results.items():
        start = final(found, COPY)
        lines.append([final(found, f"{name}, per layer") - start for name in RATIOS])
        axes.plot(list(RATIOS.values()), lines[-1], "o-", lw=0.8, alpha=0.5, label=f"seed {seed}")
    axes.plot(list(RATIOS.values()), [mean(values) for values in zip(*lines, strict=True)], "k", lw=2, label="mean")
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel="drop ratio", ylabel="final validation loss, less that of ratio 0")
    axes.legend(fontsize=7)
    for seed, found in results.items():
        runs = [found[f"{name}, per layer"]["losses"][2:] for name in POOLED]  # the start is on another scale
        gaps = [mean(drop.values()) - mean(copy.values()) for (_, copy), (_, drop) in zip(*runs, strict=True)]
        time.plot([tokens / 1e6 for tokens, _ in runs[0]], gaps, "o-", lw=0.8, label=f"seed {seed}")
    time.axhline(0, color="grey", lw=0.8)
    time.set(xlabel="million tokens after upcycling", ylabel="validation loss of ratio 0.5, less that of ratio 0")
    time.legend(fontsize=7)
    made.savefig(HERE / "drop-upcycling-ratio.png")


def draw_routing(found: dict[str, Any]) -> None:
    """Share of routes of every expert, layer and domain (the paper's Figure 5), of one seed."""
    shown = [f"{name}, {balance}" for name in (*POOLED, "scratch") for balance in BALANCE]
    shown = [name for name in shown if name in found]
    layers = len(found[shown[0]]["load"]["en"])
    made, cells = figure(HERE / "drop-upcycling-routing.png", len(shown), layers, 1.7 * layers, 1.4 * len(shown))
    for place, axes in enumerate(cells):
        name, layer = shown[place // layers], place % layers
        for shift, (domain, load) in enumerate(found[name]["load"].items()):
            axes.bar([e + shift * 0.28 for e in range(len(load[layer]))], load[layer], width=0.28, label=domain)
        axes.axhline(1 / 8, color="black", lw=0.6, ls="--")
        axes.set(xticks=[], ylim=(0, 0.52))
        axes.set_title(f"{name}: layer {layer}" if layer == 0 else f"layer {layer}", fontsize=7, loc="left")
        axes.tick_params(labelsize=6, labelleft=layer == 0)
    made.legend(*cells[0].get_legend_handles_labels(), fontsize=7, ncols=3, loc="outside upper right")
    made.savefig(HERE / "drop-upcycling-routing.png")


def table(results: Results) -> str:
    """The page's table, in Markdown: mean and standard deviation over seeds."""
    columns = ["experts, balance", "loss", "minus copy", "en", "code", "ja"]
    columns += ["largest share", "dead experts", "divergence", "similarity"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    names = [name for name in next(iter(results.values())) if name != "dense"]
    for name in names:
        runs = [found for found in results.values() if name in found]
        losses = [final(found, name) for found in runs]
        # within a seed all runs share the dense model and the order of the data, so seeds are compared in pairs
        pairs = [loss - final(found, COPY) for loss, found in zip(losses, runs, strict=True)]
        domains = [spread([found[name]["losses"][-1][1][d] for found in runs]) for d in ("en", "code", "ja")]
        shares = [mean(max(load) for layers in found[name]["load"].values() for load in layers) for found in runs]
        dead = [float(dead_everywhere(found[name]["load"])) for found in runs]
        told = [spread([found[name][what] for found in runs]) for what in ("divergence", "similarity")]
        cells = [
            spread(losses),
            "" if name == COPY else spread(pairs),
            *domains,
            spread(shares),
            spread(dead, 1),
            *told,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def dead_everywhere(load: dict[str, list[list[float]]]) -> int:
    """Experts below 1 % of their layer's routes in every domain, over all layers."""
    domains = list(load.values())
    return sum(
        all(domain[layer][expert] < 0.01 for domain in domains)
        for layer in range(len(domains[0]))
        for expert in range(len(domains[0][layer]))
    )


def main() -> None:
    """Run, keep the numbers, draw, and print the table of the page."""
    arguments = options("Drop-Upcycling, small")
    study = Study(arguments.folder, texts(arguments), MODEL, arguments.scale)
    results: Results = by_seed(arguments.seed, partial(seed_runs, study), HERE, "drop-upcycling.json")
    draw_losses(results)
    draw_ratios(results)
    draw_routing(results[arguments.seed[0]])
    print(table(results))


if __name__ == "__main__":
    main()
