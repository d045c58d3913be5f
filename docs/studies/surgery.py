"""Study: which surgery, and when? Average against decay, scores of prune, grow against training. See surgery.md.

python docs/studies/surgery.py FOLDER --text en=EN.txt --text code=CODE.txt --text ja=JA.txt
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from study import Study, by_seed, figure, mean, options, texts

MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SEQ_LEN, BATCH = 128, 8
STEP = SEQ_LEN * BATCH  # tokens
DENSE, YOUNG, LONG, HEAL = 400 * STEP, 200 * STEP, 800 * STEP, 50 * STEP
EVERY = 20 * STEP  # between snapshots
FIRST, SECOND = 200 * STEP, 300 * STEP  # before and after growth
RATE = ("--lr", "2e-3")
CONSTANT = (*RATE, "--schedule", "constant")

# What becomes of the snapshots of one run at a constant rate: options of `moetool average`.
MEANS: dict[str, tuple[object, ...]] = {
    "mean of the last 3": ("--last", 3),
    "mean of the last 5": ("--last", 5),
    "mean of the last 10": ("--last", 10),
    "minus-sqrt of the last 5": ("--last", 5, "--weights", "minus-sqrt"),
    "minus-sqrt of the last 10": ("--last", 10, "--weights", "minus-sqrt"),
}
# The same run, but the steps of the last 10 snapshots decay linearly to 0: the share of the run that does not.
DECAYS = {"decay over the last 200 steps": 0.75}
LAST = "last checkpoint"

SCORES = ("frequency", "ean", "weighted-ean", "man", "reap", "reconstruction", "auto", "random")
KEEP = (6, 4)  # of 8
AGES = ("young", "long")
UNPRUNED = "not pruned"

LOSS_FREE = ("--balance", "loss-free")
# Sleeping copies must be lowered by 1 and more, because scores are sigmoids: 1000 steps of loss-free and more. At 20
# times its rate they wake after 50 and more. All models of the second phase have this rate.
QUICK = ("--balance", "loss-free=0.02")
GROW: dict[str, tuple[object, ...]] = {"sleeping": ("--start", "sleeping"), "twins": ("--start", "twins")}
UNCHANGED, EIGHT = "4 experts, trained on", "8 experts from the start"
HERE = Path(__file__).parent / "results"

Results = dict[int, dict[str, Any]]  # of each seed


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(",", "").replace(" ", "-")


def averages(study: Study, seed: int, run: str) -> dict[str, dict[str, float]]:
    """Bits per byte of each domain: of the last checkpoint of a run at a constant rate, of means, of decays."""
    models = {LAST: run}
    for name, words in MEANS.items():
        models[name] = study.average(run, f"s{seed}/{slug(name)}", *words)
    for name, share in DECAYS.items():
        words = (*RATE, "--schedule", "wsd", "--constant-end", share, "--min-lr", 0, "--seed", seed)
        models[name] = study.cpt(f"s{seed}/moe", f"s{seed}/{slug(name)}", LONG, *words, train=study.domains)
    found = study.evaluate(f"s{seed}/scores.json", list(models.values()))
    return {name: found[model] for name, model in models.items()}


def pruned(study: Study, seed: int, age: str, model: str, number: int) -> dict[str, Any]:
    """The loss without some experts, before and after healing, for each score; and what auto took."""
    data = [word for name in study.domains for word in ("--data", f"{name}=corpus/{name}-train.jsonl")]
    found: dict[str, Any] = {}
    for score in SCORES:
        out = f"s{seed}/{age}-{number}-{score}"
        words = [*data, "--max-tokens", "8k", "--seq-len", SEQ_LEN, "--score", score]
        words += ["--seed", seed] if score == "random" else []
        document = study.document(f"{out}.json", "prune", model, out, "--keep-experts", number, *words)
        found[score] = {"kept": [row["kept"] for row in document["layers"]], "taken": document["score"]}
        found[score] |= {"errors": document["errors"], "mass": mean(row["mass_kept"] for row in document["layers"])}
    losses: dict[str, list[float]] = {}
    for score, entry in found.items():
        kept = json.dumps(entry["kept"])
        if kept not in losses:  # two scores that keep the same experts give the same model, which is healed once
            losses[kept] = healed(study, seed, f"s{seed}/{age}-{number}-{score}")
        entry["losses"] = losses[kept]
    return found


def healed(study: Study, seed: int, model: str, out: str = "") -> list[float]:
    """The loss of a model before and after a few more steps, mean of the domains; not on text of its first steps."""
    words = (*RATE, "--seed", 1000 + seed)
    run = study.cpt(model, out or f"{model}-healed", HEAL, *words, train=study.domains, evaluations=1)
    losses = study.losses(run)
    return [mean(losses[place][1].values()) for place in (0, -1)]


def growths(study: Study, seed: int) -> dict[str, list[tuple[int, float]]]:
    """(tokens, loss) of 4 experts that are trained on, grown to 8 and trained, and of 8 from the start."""
    start, found = {}, {}
    for number in (4, 8):
        made = ("--target", "glm4_moe", "--num-experts", number, "--seed", seed)
        moe, first = study.upcycle(f"s{seed}/dense", f"s{seed}/glm-{number}", *made), f"s{seed}/glm-{number}-first"
        start[number] = study.cpt(moe, first, FIRST, *CONSTANT, *LOSS_FREE, "--seed", seed, train=study.domains)
    models = {UNCHANGED: start[4], EIGHT: start[8]}
    for name, how in GROW.items():
        models[name] = study.grow(start[4], f"s{seed}/{name}", "--num-experts", 8, *how)
    for name, model in models.items():
        words = (*RATE, *QUICK, "--seed", 1000 + seed)
        run = study.cpt(model, f"s{seed}/second-{slug(name)}", SECOND, *words, train=study.domains)
        found[name] = [(tokens, mean(losses.values())) for tokens, losses in study.losses(run)]
    return found


def seed_runs(study: Study, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    words = ("--lr", "3e-3", "--seed", seed)
    dense = study.cpt(study.initial(seed), f"s{seed}/dense", DENSE, *words, train=("en", "code"))
    moe = study.upcycle(dense, f"s{seed}/moe", "--seed", seed)
    snapshots = ("--keep-weights", study.steps(EVERY))
    run = study.cpt(moe, f"s{seed}/constant", LONG, *CONSTANT, *snapshots, "--seed", seed, train=study.domains)
    ages = {
        age: f"{run}/weights/step-{study.steps(tokens):06d}" for age, tokens in zip(AGES, (YOUNG, LONG), strict=True)
    }
    prune: dict[str, Any] = {}
    for age, model in ages.items():
        prune[age] = {str(number): pruned(study, seed, age, model, number) for number in KEEP}
        prune[age][UNPRUNED] = healed(study, seed, model, f"s{seed}/{age}-healed")
    return {"average": averages(study, seed, run), "prune": prune, "grow": growths(study, seed)}


def ranged(values: Sequence[float], sign: str = "+") -> str:
    """The mean, and the range over seeds."""
    if len(values) < 2:
        return f"{values[0]:{sign}.3f}".replace("-", "\N{MINUS SIGN}")
    shown = f"{mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"
    return shown.replace("-", "\N{MINUS SIGN}")


def part(results: Results, name: str) -> dict[int, Any]:
    """A part of the study, of the seeds that have it: a run that was cut off has fewer of the last parts."""
    return {seed: found[name] for seed, found in results.items() if name in found}


def average_table(found: dict[int, Any]) -> str:
    """Bits per byte, mean of the domains."""
    lines = ["| model | bits per byte | minus the last checkpoint |", "|---|---|---|"]
    for name in (LAST, *MEANS, *DECAYS):
        bits, last = ([mean(run[of].values()) for run in found.values()] for of in (name, LAST))
        gaps = "" if name == LAST else ranged([a - b for a, b in zip(bits, last, strict=True)])
        lines.append(f"| {name} | {ranged(bits, '')} | {gaps} |")
    return "\n".join(lines)


def rises(found: dict[int, Any], age: str, number: int, score: str) -> list[list[float]]:
    """By how much the loss is above that of the model that was not pruned: before healing, and after; of each seed."""
    runs = [run[age] for run in found.values()]
    return [[one[str(number)][score]["losses"][when] - one[UNPRUNED][when] for one in runs] for when in (0, 1)]


def prune_table(found: dict[int, Any], age: str) -> str:
    """Losses above those of the model with all experts, and what auto took."""
    titles = [f"keep {number}: {when}" for number in KEEP for when in ("at once", "healed")]
    lines = [f"| {age}: score | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for score in SCORES:
        cells = [ranged(values) for number in KEEP for values in rises(found, age, number, score)]
        lines.append(f"| {score} | {' | '.join(cells)} |")
    taken = [", ".join(run[age][str(number)]["auto"]["taken"] for run in found.values()) for number in KEEP]
    return "\n".join([*lines, f"| auto took | {' | | '.join(taken)} | |"])


def grow_table(found: dict[int, Any]) -> str:
    """The loss at once and at the end."""
    lines = ["| model | loss at the start of the second phase | at its end | minus 4 experts |", "|---|---|---|---|"]
    for name in (UNCHANGED, *GROW, EIGHT):
        start, end, same = (
            [run[of][place][1] for run in found.values()] for of, place in ((name, 0), (name, -1), (UNCHANGED, -1))
        )
        gaps = "" if name == UNCHANGED else ranged([a - b for a, b in zip(end, same, strict=True)])
        lines.append(f"| {name} | {ranged(start, '')} | {ranged(end, '')} | {gaps} |")
    return "\n".join(lines)


def table(results: Results) -> str:
    """The page's tables, in Markdown: mean and range over seeds."""
    average, prune, grow = (part(results, name) for name in ("average", "prune", "grow"))
    tables = {
        "Average against decay": (average, average_table(average)),
        "Pruning, young models": (prune, prune_table(prune, "young")),
        "Pruning, models that were trained longer": (prune, prune_table(prune, "long")),
        "Growth": (grow, grow_table(grow)),
    }
    return "\n\n".join(
        f"{title} (seeds {', '.join(map(str, found))}):\n\n{lines}" for title, (found, lines) in tables.items()
    )


def draw_prune(results: Results) -> None:
    """The rise of the loss of each score: a dot for each seed, before healing and after."""
    made, cells = figure(HERE / "surgery-prune.png", len(AGES), len(KEEP), 9.0, 5.6)
    for axes, (age, number) in zip(cells, [(age, number) for age in AGES for number in KEEP], strict=True):
        for shift, (when, colour) in enumerate((("before healing", "C1"), ("healed", "C0"))):
            for place, score in enumerate(SCORES):
                values = rises(part(results, "prune"), age, number, score)[shift]
                label = when if not place else None
                axes.plot([place + 0.2 * shift] * len(values), values, "o", ms=4, color=colour, label=label)
        axes.axhline(0, color="grey", lw=0.8)
        axes.set_xticks(range(len(SCORES)), SCORES, rotation=40, ha="right", fontsize=7)
        axes.set_title(f"{age}, {number} of 8 experts", fontsize=9, loc="left")
        axes.set_ylabel("loss above all 8", fontsize=8)
    cells[0].legend(fontsize=7)
    made.savefig(HERE / "surgery-prune.png")


def draw_grow(results: Results) -> None:
    """The loss over the second phase, less that of 4 experts at its end, mean of the seeds."""
    made, (axes,) = figure(HERE / "surgery-grow.png")
    for name in (UNCHANGED, *GROW, EIGHT):
        runs = [(run[name], run[UNCHANGED][-1][1]) for run in part(results, "grow").values()]
        x = [tokens / 1e6 for tokens, _ in runs[0][0]]
        axes.plot(x, [mean(run[i][1] - end for run, end in runs) for i in range(len(x))], "o-", ms=3, label=name)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xlabel="million tokens of the second phase", ylabel="loss, less that of 4 experts at the end")
    axes.legend(fontsize=7)
    made.savefig(HERE / "surgery-grow.png")


def main() -> None:
    """Run, keep the numbers, draw, and print the tables of the page."""
    arguments = options("Surgery, small")
    study = Study(arguments.folder, texts(arguments), MODEL, arguments.scale, SEQ_LEN, BATCH)
    results: Results = by_seed(arguments.seed, partial(seed_runs, study), HERE, "surgery.json")
    draw_prune(results)
    draw_grow(results)
    print(table(results))


if __name__ == "__main__":
    main()
