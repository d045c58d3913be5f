"""Study: a start that knows the data. Fitted routers, splits, dropped units and donors, at equal tokens. See start.md.

python docs/studies/start.py FOLDER --text en=EN.txt --text code=CODE.txt --text ja=JA.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from study import SMALL, Study, by_seed, figure, mean, options, texts

SEQ_LEN, BATCH = 128, 8
STEP = SEQ_LEN * BATCH  # tokens
DENSE, DONOR, TRAINED = 600 * STEP, 150 * STEP, 300 * STEP
RATE = ("--lr", "2e-3")
CALIBRATION = ("--max-tokens", "30k", "--seq-len", SEQ_LEN)
PARTS = ("--target", "glm4_moe", "--num-experts", 12, "--top-k", 6, "--granularity", 4, "--shared-experts", 1)
TEXT = "text"  # stands for the calibration's texts: of all domains, or of the donors
# Group -> start -> options of `moetool upcycle`. The first start of a group is what the others are compared with.
STARTS: dict[str, dict[str, tuple[object, ...]]] = {
    "router": {"normal": (), "balanced": ("--router", "balanced", TEXT)},
    "units": {
        "random": (),
        "least-used": ("--drop-units", "least-used", TEXT),
        "2 experts whole": ("--keep-experts-whole", 2),
        "0.25 in layers 0-1": ("--drop-ratio", 0.5, "--drop-ratio", "0-1=0.25"),
    },
    "split": {
        "contiguous": PARTS,
        "random": (*PARTS, "--split", "random"),
        "activation": (*PARTS, "--split", "activation", TEXT),
    },
    "donors": {
        "normal": ("--method", "copy"),
        "balanced": ("--method", "copy", "--router", "balanced", TEXT),
        "ridge": ("--method", "copy", "--router", "ridge", TEXT),
    },
    "moments": {"none": (), "carried": ("--keep-optimizer",)},
}
DONORS = ("en", "code")
HERE = Path(__file__).parent / "results"

Results = dict[int, dict[str, Any]]  # of each seed


def slug(group: str, name: str) -> str:
    """A folder's name."""
    return f"{group}-{name}".replace(".", "").replace(" ", "-")


def started(study: Study, seed: int, group: str, name: str, dense: dict[str, str]) -> dict[str, Any]:
    """A start and its training: losses, and the largest load of a layer and domain before and after."""
    words = STARTS[group][name]
    domains = DONORS if group == "donors" else study.domains
    data = [word for domain in domains for word in ("--calibrate", f"{domain}=corpus/{domain}-train.jsonl")]
    made = [one for word in words for one in ([*data, *CALIBRATION] if word == TEXT else [word])]
    out = f"s{seed}/{slug(group, name)}"
    model, more = dense["all"], []
    if group == "donors":
        model, made = dense["en"], ["--donor", dense["code"], *made]
    if group == "moments":
        model = dense["step"]
        more = ["--keep-optimizer"] if name == "carried" else []
    document = study.document(f"{out}.json", "upcycle", model, out, "--seed", seed, *made)
    run = study.cpt(out, f"{out}-trained", TRAINED, *RATE, *more, "--seed", seed, train=study.domains, evaluations=10)
    before, after = (study.analyze(one, f"{one}-routing") for one in (out, run))
    return {
        "losses": study.losses(run),
        "largest": [largest(report) for report in (before, after)],
        "predicted": predicted(document["fitted"], before),
        "loads": loads(before),
    }


def predicted(fitted: dict[str, Any] | None, report: dict[str, Any]) -> dict[str, float]:
    """Domain -> the largest difference of a predicted load from the measured one, over layers and experts."""
    found: dict[str, float] = {}
    for row in fitted["layers"] if fitted else ():
        for name, load in row["load"].items():
            measured = next(one["load"] for one in report["domains"][name]["layers"] if one["layer"] == row["layer"])
            off = max(abs(a - b) for a, b in zip(load, measured, strict=True))
            found[name] = max(found.get(name, 0.0), off)
    return found


def loads(report: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Domain -> load of each expert, by layer."""
    return {
        name: [[round(load, 4) for load in layer["load"]] for layer in one["layers"]]
        for name, one in report["domains"].items()
    }


def largest(report: dict[str, Any]) -> float:
    """The largest mri of a layer, mean of the domains, relative to the balanced value."""
    return mean(max(layer["mri_normalized"] for layer in one["layers"]) for one in report["domains"].values())


def seed_runs(study: Study, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    dense = dense_models(study, seed)
    found: dict[str, Any] = {}
    for group, starts in STARTS.items():
        found[group] = {name: started(study, seed, group, name, dense) for name in starts}
    return found


def dense_models(study: Study, seed: int) -> dict[str, str]:
    """A dense model, the step folder with its moments, and the donors that come from it."""
    words = ("--lr", "3e-3", "--schedule", "constant", "--seed", seed)
    run = study.cpt(study.initial(seed), f"s{seed}/dense", DENSE, *words, train=DONORS)
    dense = {"all": run, "step": f"{run}/checkpoints/step-{study.steps(DENSE):06d}"}
    for name in DONORS:
        more = (*RATE, "--seed", 100 + seed)
        dense[name] = study.cpt(run, f"s{seed}/donor-{name}", DONOR, *more, train=(name,), evaluations=1)
    return dense


def ranged(values: Sequence[float], sign: str = "+", digits: int = 3) -> str:
    """The mean, and the range over seeds."""
    if len(values) < 2:
        return f"{values[0]:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")
    low, high = (f"{end(values):{sign}.{digits}f}" for end in (min, max))
    return f"{mean(values):{sign}.{digits}f} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def loss_at(found: dict[str, Any], place: int, domains: Sequence[str]) -> float:
    """Mean of the domains."""
    losses: dict[str, float] = found["losses"][place][1]
    return mean(losses[name] for name in domains)


def group_table(results: Results, group: str) -> str:
    """Losses at once, after a tenth of the training, and at the end, less those of the first start; loads."""
    first, *_ = STARTS[group]
    places = {"at once": 0, "after a tenth": 1, "at the end": -1}
    domains = DONORS if group == "donors" else ("en", "code", "ja")
    titles = [*(f"loss {when}" for when in places), "largest load at once", "at the end"]
    lines = [f"| {group} | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name in STARTS[group]:
        cells = []
        for place in places.values():
            values = [loss_at(found[group][name], place, domains) for found in results.values()]
            base = [loss_at(found[group][first], place, domains) for found in results.values()]
            less = [value - other for value, other in zip(values, base, strict=True)]
            cells.append(ranged(values, "") if name == first else ranged(less))
        cells += [ranged([found[group][name]["largest"][n] for found in results.values()], "", 2) for n in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def donor_table(results: Results) -> str:
    """Share of held-out routes that go to the text's donor, by layer."""
    layers = range(SMALL["num_hidden_layers"])
    lines = [f"| router | text | {' | '.join(f'layer {n}' for n in layers)} |", "|---" * (2 + len(layers)) + "|"]
    for name in STARTS["donors"]:
        for donor, domain in enumerate(DONORS):
            cells = []
            for layer in layers:
                every = [found["donors"][name]["loads"][domain][layer] for found in results.values()]
                half = len(every[0]) // 2
                cells.append(ranged([sum(load[donor * half : (donor + 1) * half]) for load in every], "", 2))
            lines.append(f"| {name} | {domain} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(results: Results) -> str:
    """The page's tables, in Markdown: mean and range over seeds."""
    return "\n\n".join([*(group_table(results, group) for group in STARTS), donor_table(results)])


def draw(results: Results) -> None:
    """The loss over the training, less that of each group's first start, mean of the seeds."""
    made, cells = figure(HERE / "start-loss.png", 1, len(STARTS), 14.0, 3.4)
    for axes, (group, starts) in zip(cells, STARTS.items(), strict=True):
        domains = DONORS if group == "donors" else ("en", "code", "ja")
        first, *_ = starts
        for name in starts:
            runs = [(found[group][name], found[group][first]) for found in results.values()]
            number = len(runs[0][0]["losses"])
            gaps = [mean(loss_at(a, i, domains) - loss_at(b, i, domains) for a, b in runs) for i in range(number)]
            x = [tokens / STEP for tokens, _ in runs[0][0]["losses"]]
            axes.plot(x[1:], gaps[1:], "o-", ms=3, label=name)
        axes.set_title(group, fontsize=9, loc="left")
        axes.set_xlabel("steps", fontsize=8)
        axes.legend(fontsize=7)
    cells[0].set_ylabel("loss, less that of the first", fontsize=8)
    made.savefig(HERE / "start-loss.png")


def main() -> None:
    """Run, keep the numbers, draw, and print the tables of the page."""
    arguments = options("Starts, small")
    study = Study(arguments.folder, texts(arguments), SMALL, arguments.scale, SEQ_LEN, BATCH)
    results: Results = by_seed(arguments.seed, partial(seed_runs, study), HERE, "start.json")
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
