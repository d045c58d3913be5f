"""What all studies share: text, tokenizer, dense models, and moetool's commands, run once each.

Nothing here trains or measures: every number comes from a command that is printed as it is run. A
command whose result is there already is not run again, and one that was interrupted continues, so a study
that was stopped is started again by the same line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

VALIDATION = 40_000  # bytes of each text, in whole lines
SEQ_LEN, BATCH = 256, 8
# A Llama of 0.23 M parameters, for studies of many runs.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Each command runs in a process of its own, forked from one that has imported these, which takes seconds.
PRELOAD = ["moetool.cli", "moetool.surgery.apply", "moetool.train.build", "moetool.train.open", "transformers"]
_CONTEXT = multiprocessing.get_context("forkserver")


def options(description: str) -> argparse.Namespace:
    """The options of a study; texts are NAME=PATH, one paragraph a line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH", help="en, code and ja")
    parser.add_argument("--seed", action="append", type=int, metavar="N", help="default: 0, 1 and 2")
    parser.add_argument("--scale", type=float, default=1.0, help="times the tokens of every run, to try the script")
    arguments = parser.parse_args()
    arguments.seed = arguments.seed or [0, 1, 2]
    return arguments


class Study:
    """A folder, and what is run in it."""

    def __init__(
        self,
        folder: Path,
        texts: Mapping[str, Path],
        model: Mapping[str, Any],
        scale: float = 1.0,
        seq_len: int = SEQ_LEN,
        batch: int = BATCH,
    ) -> None:
        self.folder, self.model, self.scale = folder.absolute(), dict(model), scale
        self.seq_len, self.batch = seq_len, batch
        self.domains = list(texts)
        self._prepare(texts)
        _CONTEXT.set_forkserver_preload(PRELOAD)

    def _prepare(self, texts: Mapping[str, Path]) -> None:
        """Split each text into paragraphs for training and validation; train the tokenizer on all domains."""
        corpus = self.folder / "corpus"
        if (self.folder / "tokenizer" / "tokenizer.json").exists():
            return
        corpus.mkdir(parents=True, exist_ok=True)
        training = []
        for name, path in texts.items():
            lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            random.Random(name).shuffle(lines)
            sizes = itertools.accumulate(len(line.encode()) for line in lines)
            held = next(i for i, size in enumerate(sizes, 1) if size >= VALIDATION)
            for part, some in (("val", lines[:held]), ("train", lines[held:])):
                rows = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in some)
                (corpus / f"{name}-{part}.jsonl").write_text(rows, encoding="utf-8")
            training += lines[held:]
        self._tokenizer(training).save_pretrained(self.folder / "tokenizer")

    def _tokenizer(self, lines: Iterable[str]) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.model["vocab_size"],
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

    def initial(self, seed: int) -> str:
        """A randomly initialised dense model with the tokenizer; its name in the folder."""
        name = f"s{seed}/init"
        if not (self.folder / name / "config.json").exists():
            import torch
            from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

            torch.manual_seed(seed)
            LlamaForCausalLM(LlamaConfig(**self.model)).save_pretrained(self.folder / name)
            AutoTokenizer.from_pretrained(self.folder / "tokenizer").save_pretrained(self.folder / name)
        return name

    def run(self, *words: object, to: Path | None = None) -> None:
        """Run a moetool command in the folder, printed as it is typed there; `to` takes its standard output."""
        command = [str(word) for word in words]
        redirected = f" > {to.relative_to(self.folder)}" if to else ""
        print(f"$ moetool {shlex.join(command)}{redirected}", flush=True)
        process = _CONTEXT.Process(target=_moetool, args=(command, str(self.folder), str(to or "")))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"the command above ended with {process.exitcode}; the same command continues the study")

    def document(self, name: str, *words: object) -> dict[str, Any]:
        """The JSON document of a command, kept under a name; a command whose document is there is not run again."""
        path = self.folder / name
        if not path.exists():
            part = path.with_suffix(".part")
            self.run(*words, "--json", "--quiet", to=part)
            part.replace(path)
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def steps(self, tokens: float) -> int:
        """Of a run of so many tokens."""
        return max(1, round(tokens * self.scale / (self.seq_len * self.batch)))

    def upcycle(self, dense: str, out: str, *words: object) -> str:
        """`moetool upcycle`, unless its result is there."""
        if not (self.folder / out / "config.json").exists():
            self.run("upcycle", dense, out, *words, "--quiet")
        return out

    def average(self, run: str, out: str, *words: object) -> str:
        """`moetool average` of a run, unless its result is there."""
        if not (self.folder / out / "config.json").exists():
            self.run("average", out, run, *words, "--quiet")
        return out

    def grow(self, model: str, out: str, *words: object) -> str:
        """`moetool grow`, unless its result is there."""
        if not (self.folder / out / "config.json").exists():
            self.run("grow", model, out, *words, "--quiet")
        return out

    def evaluate(self, name: str, models: Sequence[str]) -> dict[str, dict[str, float]]:
        """`moetool eval` on the validation text of every domain: model -> domain -> bits per byte."""
        data = [word for domain in self.domains for word in ("--text", f"{domain}=corpus/{domain}-val.jsonl")]
        document = self.document(name, "eval", *models, *data, "--batch-size", 16)
        return {
            folder: {
                domain: document["results"][short][domain]["bits_per_byte,none"]["value"] for domain in self.domains
            }
            for short, folder in document["models"].items()
        }

    def cpt(
        self, model: str, out: str, tokens: float, *words: object, train: Sequence[str], evaluations: int = 5
    ) -> str:
        """`moetool cpt` on some domains, validated on all before and `evaluations` times after, unless it is there."""
        if not (self.folder / out / "summary.json").exists():
            steps = max(8, self.steps(tokens))
            named = [word for name in train for word in ("--train", f"{name}=corpus/{name}-train.jsonl")]
            val = [word for name in self.domains for word in ("--val", f"{name}=corpus/{name}-val.jsonl")]
            size = ["--seq-len", self.seq_len, "--global-batch-size", self.batch, "--micro-batch-size", self.batch]
            size += ["--max-steps", steps]
            often = ["--eval-every", max(1, steps // evaluations), "--save-every", max(1, steps // 4)]
            self.run("cpt", model, out, *named, *words, *val, *size, *often, "--keep-checkpoints", 1, "--quiet")
        return out

    def analyze(self, model: str, out: str, *words: object) -> dict[str, Any]:
        """`moetool analyze-routing` on the validation text of every domain; its report."""
        report = self.folder / out / "report.json"
        if not report.exists():
            data = [word for name in self.domains for word in ("--data", f"{name}=corpus/{name}-val.jsonl")]
            self.run("analyze-routing", model, *data, "--seq-len", self.seq_len, "--out", out, *words, "--quiet")
        document: dict[str, Any] = json.loads(report.read_text())
        return document

    def rows(self, run: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, run: str) -> list[tuple[int, dict[str, float]]]:
        """(tokens, validation loss a domain) over a run."""
        return [(row["step"] * self.seq_len * self.batch, row["val"]) for row in self.rows(run) if "val" in row]


def _moetool(command: list[str], folder: str, to: str) -> None:
    os.chdir(folder)
    if to:
        descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.close(descriptor)
    sys.argv = ["moetool", *command]
    from moetool.__main__ import main

    main()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(list(values))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    shown = f"{mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    return shown.replace("-", "\N{MINUS SIGN}")


def figure(path: Path, rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.0) -> tuple[Any, Any]:
    """A matplotlib figure and its axes in a flat list, in one style; save with `figure.savefig(path)`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    made, cells = plt.subplots(rows, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False)
    for axes in cells.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return made, list(cells.flat)


def by_seed(seeds: Iterable[int], run: Callable[[int], Any], folder: Path, name: str) -> dict[int, Any]:
    """What `run` finds of each seed; raw results are written beside the study after each."""
    results: dict[int, Any] = {}
    for seed in seeds:
        results[seed] = run(seed)
        keep(folder, name, {str(one): found for one, found in results.items()})
    return results


def keep(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write raw results beside the study."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document)
    temporary = folder / f"{name}.tmp"
    temporary.write_text(text + "\n")
    os.replace(temporary, folder / name)


def texts(arguments: argparse.Namespace) -> dict[str, Path]:
    """The texts of the command line, by name."""
    named = dict(word.split("=", 1) for word in arguments.text)
    missing = {"en", "code", "ja"} - set(named)
    if missing:
        raise SystemExit(f"give --text {' and '.join(f'{name}=PATH' for name in sorted(missing))}")
    return {name: Path(path).absolute() for name, path in named.items()}
