"""Study: what does a shift of distribution do to a router, small? See router-robustness.md.

python docs/studies/router_robustness.py FOLDER --text en=EN.txt --text code=CODE.txt --text ja=JA.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from study import Study, figure, keep, mean, options, spread, texts

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FIRST, SECOND = 0.8e6, 0.3e6
HERE = Path(__file__).parent / "results"
# Every model costs a token as many products as the dense one: two halves of its FFN, or three quarters of it
# beside a shared quarter. All start from scratch, as the paper's do.
MODELS: dict[str, tuple[str, ...]] = {
    "top-2": ("--num-experts", "8", "--top-k", "2", "--granularity", "2"),
    "fine-grained": (
        *("--target", "glm4_moe", "--num-experts", "24", "--top-k", "3"),
        *("--granularity", "4", "--shared-experts", "1"),
    ),
}
RATES = ("--lr", "3e-3", "--min-lr", "3e-4")
SINKHORN = ("--balance", "sinkhorn")
# The first phase stays in its constant part, the second begins there: no re-warming.
INFINITE = ("--schedule", "infinite", "--constant-lr", "1.65e-3")
LEAVE = (*INFINITE, "--constant-end", "1.0")
ENTER = (*INFINITE, "--warmup-ratio", "0", "--cooldown-end", "0", "--constant-end", "0.8")
SHIFTS = ("ja", "code")
REPLAY = ("0", "0.1", "0.3", "0.4")


class Way(NamedTuple):
    """A way through both phases: a model, options of each phase, and the replay ratios tried."""

    model: str
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    replay: tuple[str, ...] = REPLAY


WAYS: dict[str, Way] = {
    "dense": Way("dense"),
    "top-2": Way("top-2"),
    "top-2, infinite": Way("top-2", LEAVE, ENTER, ("0.3",)),
    "top-2, sinkhorn": Way("top-2", SINKHORN, SINKHORN, ("0", "0.3")),
    "fine-grained": Way("fine-grained"),
}
CLAIMED = ("0", "0.3")  # the replay ratios that every seed runs; the first seed runs all

Results = dict[int, dict[str, Any]]  # of each seed


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(", ", "-")


def start(study: Study, seed: int, model: str) -> str:
    """A model of the seed before any training."""
    dense = study.initial(seed)
    if model == "dense":
        return dense
    return study.upcycle(dense, f"s{seed}/{model}", "--method", "scratch", *MODELS[model], "--seed", seed)


def trained(study: Study, seed: int, name: str) -> str:
    """The first phase: English."""
    way = WAYS[name]
    begin, out = start(study, seed, way.model), f"s{seed}/{slug(name)}-en"
    return study.cpt(begin, out, FIRST, *RATES, *way.first, "--seed", seed, train=("en",))


def shifted(study: Study, seed: int, name: str, shift: str, replay: str) -> dict[str, Any]:
    """The second phase: forgetting, adaptation, mri, and what changed in the router."""
    before = trained(study, seed, name)
    words: list[object] = [*RATES, *WAYS[name].second, "--seed", seed]
    if replay != "0":
        words += ["--replay", "en=corpus/en-train.jsonl", "--replay-ratio", replay]
    run = study.cpt(before, f"{before}-{shift}-{replay}", SECOND, *words, train=(shift,))
    losses = study.losses(run)
    entry: dict[str, Any] = {
        "forgetting": losses[-1][1]["en"] - losses[0][1]["en"],
        "adaptation": losses[0][1][shift] - losses[-1][1][shift],
        "losses": losses,
    }
    if name != "dense":
        steps = {
            when: [row["mri"] for row in study.rows(of) if "mri" in row]
            for when, of in (("before", before), ("after", run))
        }
        entry["mri"] = {"before": steps["before"][-40:], "after": steps["after"]}
        report = study.analyze(before, f"{run}-routing", "--compare", run)["comparison"]
        told = ("saturation", "mri", "mri_change")
        entry["comparison"] = {
            "domains": {
                domain: {"layers": [{name: layer[name] for name in told} for layer in part["layers"]]}
                for domain, part in report["domains"].items()
            }
        }
    return entry


def union(study: Study, seed: int, shift: str) -> dict[str, float]:
    """The baseline: the top-2 model trained on both domains together, with as many tokens of each as in two phases."""
    begin, out = start(study, seed, "top-2"), f"s{seed}/union-{shift}"
    shares = ("--weight", f"en={FIRST / 1e6}", "--weight", f"{shift}={SECOND / 1e6}")
    run = study.cpt(begin, out, FIRST + SECOND, *RATES, *shares, "--seed", seed, train=("en", shift))
    return study.losses(run)[-1][1]


def draw_trade(results: Results) -> None:
    """Forgetting against adaptation, a point a replay ratio: means over the seeds that ran it."""
    made, cells = figure(HERE / "router-robustness-trade.png", columns=2, width=10.0)
    for shift, axes in zip(SHIFTS, cells, strict=True):
        for name in WAYS:
            points = []
            for replay in REPLAY:
                runs = [found["second"].get(f"{name} -> {shift}, replay {replay}") for found in results.values()]
                runs = [run for run in runs if run]
                if runs:
                    learnt = mean(run["losses"][-1][1][shift] for run in runs)
                    points.append((learnt, mean(run["forgetting"] for run in runs)))
                    axes.annotate(replay, points[-1], fontsize=6, xytext=(3, 3), textcoords="offset points")
            axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4, lw=1)
        axes.set(xlabel=f"adaptation: loss on {shift} at the end", ylabel="forgetting: rise of the loss on en")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.legend(fontsize=7)
    made.savefig(HERE / "router-robustness-trade.png")


def balanced(name: str) -> float:
    """K / E of a model."""
    words = MODELS[WAYS[name].model]
    return int(words[words.index("--top-k") + 1]) / int(words[words.index("--num-experts") + 1])


def draw_shift(found: dict[str, Any]) -> None:
    """mri over the steps around the shift, mean of the layers, in multiples of balance; of one seed."""
    made, cells = figure(HERE / "router-robustness-mri.png", columns=2, width=10.0)
    for shift, axes in zip(SHIFTS, cells, strict=True):
        for color, name in enumerate(WAYS):
            for replay, style in (("0", "-"), ("0.3", ":")):
                entry = found["second"].get(f"{name} -> {shift}, replay {replay}", {})
                if "mri" in entry:
                    steps = [mean(layers) / balanced(name) for layers in entry["mri"]["before"]]
                    x = range(-len(steps), len(entry["mri"]["after"]))
                    steps += [mean(layers) / balanced(name) for layers in entry["mri"]["after"]]
                    axes.plot(list(x), steps, style, color=f"C{color}", lw=1, label=f"{name}, replay {replay}")
        axes.axvline(0, color="grey", lw=0.8)
        axes.set(xlabel=f"steps after the shift to {shift}", ylabel="mri x E / K, mean of the layers")
    made.legend(*cells[0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
    made.savefig(HERE / "router-robustness-mri.png")


def draw_layers(results: Results) -> None:
    """Saturation, and mri before and after, of each layer on English; means over seeds."""
    names = [name for name, way in WAYS.items() if way.model != "dense"]
    made, cells = figure(HERE / "router-robustness-layers.png", 2, len(names), 3.0 * len(names), 5.0)
    for column, name in enumerate(names):
        saturation, mri = cells[column], cells[len(names) + column]
        for shift, color in zip(SHIFTS, ("C0", "C1"), strict=True):
            for replay, style in (("0", "o-"), ("0.3", "o:")):
                if replay not in WAYS[name].replay:
                    continue
                key = f"{name} -> {shift}, replay {replay}"
                runs = [found["second"][key]["comparison"]["domains"]["en"]["layers"] for found in results.values()]
                layers = range(len(runs[0]))
                label = f"{shift}, replay {replay}"
                saturation.plot(
                    layers, [mean(r[i]["saturation"] for r in runs) for i in layers], style, color=color, label=label
                )
                mri.plot(layers, [mean(r[i]["mri"] for r in runs) for i in layers], style, color=color, label=label)
        mri.plot(layers, [mean(r[i]["mri"] - r[i]["mri_change"] for r in runs) for i in layers], "k-", label="before")
        saturation.set_title(name, fontsize=8)
        saturation.set(ylim=(0, 1), ylabel="saturation, en")
        mri.set(ylim=(0, 1), ylabel="mri, en", xlabel="layer")
    handles = cells[len(names)].get_legend_handles_labels()
    made.legend(*handles, fontsize=7, ncols=5, loc="outside lower center")
    made.savefig(HERE / "router-robustness-layers.png")


def movement(mri: dict[str, list[list[float]]], even: float) -> tuple[float, float, float]:
    """mri in training over balance, mean of layers: last 20 steps before, highest 10 after, last 20 of all."""
    before, after = ([mean(layers) / even for layers in mri[when]] for when in ("before", "after"))
    peak = max(mean(after[i : i + 10]) for i in range(max(1, len(after) - 9)))
    return mean(before[-20:]), peak, mean(after[-20:])


def table(results: Results) -> str:
    """The page's tables, in Markdown: mean and standard deviation over seeds."""
    columns = ["model, phase two", "forgetting", "adaptation", "en", "new domain", "mri before", "peak", "end"]
    columns += ["mri, en, before", "after", "saturation, en"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    first = next(iter(results.values()))
    for key in first["second"]:
        shift = key.split(" -> ")[1].split(",")[0]
        runs = [found["second"][key] for found in results.values() if key in found["second"]]
        cells = [spread([run[what] for run in runs]) for what in ("forgetting", "adaptation")]
        cells += [spread([run["losses"][-1][1][domain] for run in runs]) for domain in ("en", shift)]
        told = [run["comparison"]["domains"]["en"]["layers"] for run in runs if "comparison" in run]
        if told:
            moves = [movement(run["mri"], balanced(key.split(" -> ")[0])) for run in runs]
            cells += [spread(values, 2) for values in zip(*moves, strict=True)]
            cells.append(spread([mean(layer["mri"] - layer["mri_change"] for layer in layers) for layers in told]))
            cells += [spread([mean(layer[of] for layer in layers) for layers in told]) for of in ("mri", "saturation")]
        else:
            cells += [""] * 6
        lines.append(f"| {key} | {' | '.join(cells)} |")
    lines += ["", "| trained on the union | en | new domain |", "|---|---|---|"]
    for shift in SHIFTS:
        values = [[found["union"][shift][domain] for found in results.values()] for domain in ("en", shift)]
        lines.append(f"| top-2, en and {shift} | {' | '.join(spread(seeds) for seeds in values)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, keep the numbers, draw, and print the tables of the page."""
    arguments = options("The router under a shift of distribution, small")
    study = Study(arguments.folder, texts(arguments), MODEL, arguments.scale)
    results: Results = {}
    for seed in arguments.seed:
        found: dict[str, Any] = {}
        for shift in SHIFTS:
            for name, way in WAYS.items():
                for replay in way.replay:
                    if replay in CLAIMED or seed == arguments.seed[0]:
                        found[f"{name} -> {shift}, replay {replay}"] = shifted(study, seed, name, shift, replay)
        results[seed] = {"second": found, "union": {shift: union(study, seed, shift) for shift in SHIFTS}}
    keep(HERE, "router-robustness.json", {str(seed): found for seed, found in results.items()})
    draw_trade(results)
    draw_shift(results[arguments.seed[0]])
    draw_layers(results)
    print(table(results))


if __name__ == "__main__":
    main()
