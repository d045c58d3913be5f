"""Study: what keeps a model from forgetting when nobody has its pretraining data. See forgetting.md.

python docs/studies/forgetting.py FOLDER --text en=EN.txt --text code=CODE.txt --text ja=JA.txt
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from study import SMALL, Study, by_seed, figure, mean, options, spread, texts

SEQ_LEN, BATCH = 128, 8
STEP = SEQ_LEN * BATCH  # tokens
DENSE, TRAINED = 1500 * STEP, 500 * STEP
OLD, NEW, SHARE = "en", "code", 0.3
REAL, SELF = f"{OLD}=corpus/{OLD}-train.jsonl", "self={samples}"
REPLAY = ("--replay-ratio", SHARE, "--replay")
TEACHER = ("--teacher", "{dense}")
# Arm -> options of `moetool cpt`.
ARMS: dict[str, tuple[object, ...]] = {
    "nothing": (),
    "real replay": (*REPLAY, REAL),
    "self-generated replay": (*REPLAY, SELF),
    "self-generated replay and KL": (*REPLAY, SELF, *TEACHER),
    "KL alone": (*TEACHER, "--teacher-on", "all"),
}
HERE = Path(__file__).parent / "results"

Results = dict[int, dict[str, Any]]  # of each seed


def seed_runs(study: Study, seed: int) -> dict[str, Any]:
    """A dense model of the old domain, what it says when nobody asks, and a run of each arm on the new domain."""
    words = ("--lr", "3e-3", "--min-lr", "3e-4", "--seed", seed)
    dense = study.cpt(study.initial(seed), f"s{seed}/dense", DENSE, *words, train=(OLD,), evaluations=1)
    tokens = max(SEQ_LEN, round(TRAINED * SHARE * study.scale))
    samples = f"s{seed}/samples.jsonl"
    study.document(
        f"s{seed}/samples.json", "sample", dense, samples, "--max-tokens", tokens, "--seq-len", SEQ_LEN, "--seed", seed
    )
    moe = study.upcycle(dense, f"s{seed}/moe", "--num-experts", 8, "--top-k", 2, "--seed", seed)
    found: dict[str, Any] = {"dense": study.losses(dense)[-1][1]}
    for arm, more in ARMS.items():
        filled = [str(word).format(samples=samples, dense=dense) for word in more]
        out = f"s{seed}/{arm.replace(' ', '-')}"
        run = study.cpt(moe, out, TRAINED, "--lr", "2e-3", *filled, "--seed", seed, train=(NEW,), evaluations=10)
        found[arm] = study.losses(run)
    return found


def end(found: dict[str, Any], arm: str, domain: str) -> float:
    """The last loss of an arm on a domain."""
    return float(found[arm][-1][1][domain])


def table(results: Results) -> str:
    """Losses at the end, in Markdown: mean and standard deviation over seeds."""
    titles = ["English at the end", "forgetting", "share of the forgetting", "code at the end", "code, less nothing's"]
    lines = [f"| arm | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    every = list(results.values())
    for arm in ARMS:
        forgotten = [end(found, arm, OLD) - found["dense"][OLD] for found in every]
        whole = [end(found, "nothing", OLD) - found["dense"][OLD] for found in every]
        rows = [
            spread([end(found, arm, OLD) for found in every]),
            spread(forgotten),
            f"{mean(a / b if b else 1 for a, b in zip(forgotten, whole, strict=True)):.0%}".replace(
                "-", "\N{MINUS SIGN}"
            ),
            spread([end(found, arm, NEW) for found in every]),
            spread([end(found, arm, NEW) - end(found, "nothing", NEW) for found in every]),
        ]
        lines.append(f"| {arm} | {' | '.join(rows)} |")
    return "\n".join(lines)


def draw(results: Results) -> None:
    """Losses over the training, mean of the seeds."""
    made, cells = figure(HERE / "forgetting.png", 1, 2, 9.0, 3.6)
    every = list(results.values())
    for axes, domain, title in zip(cells, (OLD, NEW), ("English, the old domain", "code, the new one"), strict=True):
        for arm in ARMS:
            x = [tokens / STEP for tokens, _ in every[0][arm]]
            y = [mean(found[arm][place][1][domain] for found in every) for place in range(len(x))]
            axes.plot(x, y, "o-", ms=3, label=arm)
        if domain == OLD:
            axes.axhline(mean(found["dense"][OLD] for found in every), color="gray", lw=1, ls="--", label="dense model")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("steps", fontsize=8)
    cells[0].set_ylabel("validation loss (nats)", fontsize=8)
    made.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    made.savefig(HERE / "forgetting.png")


def main() -> None:
    """Run, keep the numbers, draw, and print the page's table."""
    arguments = options("Forgetting, small")
    study = Study(arguments.folder, texts(arguments), SMALL, arguments.scale, SEQ_LEN, BATCH)
    results: Results = by_seed(arguments.seed, partial(seed_runs, study), HERE, "forgetting.json")
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
