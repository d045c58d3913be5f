"""The whole journey in small, on text that is on every machine.

Each step except the first is a moetool command. `journey` hands the argument lists to `run`, which
executes them in this process and returns the document that the command prints with `--json`. So the
command that a reader sees is the command that ran.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetool.data.installed import code, prose, split
from moetool.progress import Progress, silent

CORPUS = 2_500_000  # characters of prose, and as many of code
VALIDATION = 0.03  # share of the documents
VOCABULARY, SEQ_LEN = 2048, 128
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DENSE_STEPS, CPT_STEPS = 320, 100
LIMIT = 100  # questions of the multiple-choice task

Run = Callable[[list[str]], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """A command of the journey: its purpose, and its arguments."""

    title: str
    arguments: list[str]


def prepare(folder: Path, seed: int, progress: Progress = silent) -> dict[str, Any]:
    """Write the corpus, a tokenizer, a randomly initialised Llama and an evaluation task.

    Returns:
        Characters and documents of each file, and the model's parameters.
    """
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for domain, collect in (("prose", prose), ("code", code)):
        train, held = split(collect(CORPUS, progress), VALIDATION)
        for part, documents in (("train", train), ("val", held)):
            lines = (json.dumps({"text": document}) + "\n" for document in documents)
            (corpus / f"{domain}-{part}.jsonl").write_text("".join(lines), encoding="utf-8")
            sizes[f"{domain}-{part}"] = {"documents": len(documents), "characters": sum(map(len, documents))}
            texts[f"{domain}-{part}"] = documents
    progress("tokenizer and model", 0, 1)
    tokenizer = train_tokenizer([*texts["prose-train"], *texts["code-train"]])
    parameters = save_random_llama(folder / "init", tokenizer, seed)
    write_task(folder / "tasks", texts["prose-val"])
    progress("tokenizer and model", 1, 1)
    return {"corpus": sizes, "parameters": parameters}


def train_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE with <|endoftext|> as token 0, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_random_llama(folder: Path, tokenizer: Any, seed: int) -> int:
    """A randomly initialised Llama with its tokenizer; returns its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def write_task(folder: Path, documents: list[str]) -> None:
    """A multiple-choice task for lm-eval: which of four passages has its words in order?

    The right one continues the context as in the text. In each of the others two neighbouring words
    are swapped, so length and vocabulary give nothing away. Chance is 25 %.
    """
    rows: list[dict[str, Any]] = []
    for document in documents:
        words = document.split()
        for start in range(0, min(len(words), 400) - 40, 80):
            context, passage = words[start : start + 20], words[start + 20 : start + 28]
            swaps = random.Random(" ".join(passage)).sample(range(7), 7)
            choices = {" ".join(passage): None}
            for at in swaps:  # one word is swapped with the next
                if len(choices) < 4:
                    swapped = [*passage[:at], passage[at + 1], passage[at], *passage[at + 2 :]]
                    choices[" ".join(swapped)] = None
            if len(choices) == 4:
                right = len(rows) % 4
                ordered, *others = choices
                others.insert(right, ordered)
                rows.append({"context": " ".join(context), "choices": others, "right": right})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "word-order.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "word-order.yaml").write_text(
        f"""task: word-order
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(path.absolute()))}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        encoding="utf-8",
    )


def steps(folder: Path, seed: int) -> Iterator[Step]:
    """The commands of the journey, in order; all paths lie in `folder`."""
    import torch

    def at(name: str) -> str:
        return str(folder / name)

    val = [f"--val={domain}={at(f'corpus/{domain}-val.jsonl')}" for domain in ("prose", "code")]
    size = ["--seq-len", str(SEQ_LEN), "--global-batch-size", "16", "--micro-batch-size", "16", "--seed", str(seed)]
    if torch.cuda.is_available():  # compiling would take longer than it saves in so small a run
        size.append("--no-compile")
    prose_text, code_text = f"prose={at('corpus/prose-train.jsonl')}", f"code={at('corpus/code-train.jsonl')}"

    def cpt(model: str, out: str, num_steps: int, *more: str) -> list[str]:
        often = ["--eval-every", str(max(1, num_steps // 4)), "--save-every", str(max(1, num_steps // 2))]
        return ["cpt", at(model), at(out), *more, *val, "--max-steps", str(num_steps), *often, *size]

    yield Step(
        "Pretrain the dense model on prose",
        cpt("init", "dense", DENSE_STEPS, "--train", prose_text, "--lr", "3e-3", "--keep-checkpoints", "1"),
    )
    yield Step(
        "Upcycle it: 8 experts, half of each expert's units redrawn",
        ["upcycle", at("dense"), at("moe"), "--drop-ratio", "0.5", "--seed", str(seed)],
    )
    yield Step(
        "Upcycle it with ratio 0: the experts are copies, so the outputs equal the dense model's",
        ["upcycle", at("dense"), at("moe-copy"), "--drop-ratio", "0", "--seed", str(seed)],
    )
    replay = ["--replay", prose_text, "--replay-ratio", "0.3"]
    rate = ["--lr", "1e-3", "--train", code_text, "--keep-checkpoints", "1"]
    yield Step(
        "Continue pretraining on code, with prose as replay", cpt("moe", "cpt-replay", CPT_STEPS, *rate, *replay)
    )
    yield Step("The same without replay", cpt("moe", "cpt-no-replay", CPT_STEPS, *rate))
    yield Step("Train the copies for one step, to measure their starting loss", cpt("moe-copy", "cpt-copy", 1, *rate))
    domains = [f"--data={domain}={at(f'corpus/{domain}-val.jsonl')}" for domain in ("prose", "code")]
    yield Step(
        "Analyse the routers before and after training",
        [
            "analyze-routing",
            at("moe"),
            "--compare",
            at("cpt-replay"),
            *domains,
            "--seq-len",
            str(SEQ_LEN),
            "--out",
            at("routing"),
        ],
    )
    texts = [f"--text={domain}={at(f'corpus/{domain}-val.jsonl')}" for domain in ("prose", "code")]
    yield Step(
        "Evaluate all checkpoints with lm-evaluation-harness",
        [
            "eval", *(at(name) for name in ("dense", "moe", "cpt-replay", "cpt-no-replay")), "--baseline", at("dense"),
            "--tasks", "word-order", "--include-path", at("tasks"), *texts, "--limit", str(LIMIT),
            "--batch-size", "16", "--out", at("eval"),
        ],
    )  # fmt: skip


def journey(folder: Path, seed: int, run: Run, tell: Callable[[Step], None]) -> dict[str, Any]:
    """Run every step; return their measurements.

    Args:
        folder: prepared by `prepare`.
        seed: of all steps.
        run: executes a moetool command line and returns its document.
        tell: called with each step before it runs.
    """
    results: dict[str, dict[str, Any]] = {}
    for step in steps(folder, seed):
        tell(step)
        name = step.arguments[0] if step.arguments[0] in ("analyze-routing", "eval") else Path(step.arguments[2]).name
        results[name] = run(step.arguments)
    return summarize(results, folder)


def summarize(results: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The numbers of the closing table, from the commands' own documents.

    Forgetting is the loss on prose minus the loss of the dense model, which was trained on prose: after
    continual pretraining, and at its start. Adaptation is the same difference for code; below 0 means learning.
    """
    runs = {name: results[name]["val"] for name in ("dense", "cpt-replay", "cpt-no-replay", "cpt-copy")}
    dense = {domain: loss["after"] for domain, loss in runs["dense"].items()}
    losses = {
        "random": {domain: loss["before"] for domain, loss in runs["dense"].items()},
        "dense": dense,
        "moe-copy": {domain: loss["before"] for domain, loss in runs["cpt-copy"].items()},
        "moe": {domain: loss["before"] for domain, loss in runs["cpt-replay"].items()},
        "cpt-replay": {domain: loss["after"] for domain, loss in runs["cpt-replay"].items()},
        "cpt-no-replay": {domain: loss["after"] for domain, loss in runs["cpt-no-replay"].items()},
    }
    return {
        "folder": str(folder),
        "ln_vocabulary": math.log(VOCABULARY),
        "losses": losses,
        "forgetting": {
            name: losses[name]["prose"] - dense["prose"] for name in ("moe-copy", "moe", "cpt-replay", "cpt-no-replay")
        },
        "adaptation": {name: losses[name]["code"] - dense["code"] for name in ("cpt-replay", "cpt-no-replay")},
        "routing": routing_summary(results["analyze-routing"]),
        "accuracy": accuracies(results["eval"]),
        "report": results["analyze-routing"]["files"]["html"],
        "checkpoints": {name: str(folder / name) for name in ("dense", "moe", "cpt-replay", "cpt-no-replay")},
        "eval": str(folder / "eval" / "results.json"),
    }


def routing_summary(report: dict[str, Any]) -> dict[str, Any]:
    """Largest and mean mri over layers, per domain, before and after training."""
    summary: dict[str, Any] = {"balanced": report["top_k"] / report["num_experts"], "domains": {}}
    for name, domain in report["domains"].items():
        compared = report["comparison"]["domains"][name]["layers"]
        before = [layer["mri"] for layer in domain["layers"]]
        after = [layer["mri"] for layer in compared]
        summary["domains"][name] = {
            "before": {"mean": sum(before) / len(before), "max": max(before)},
            "after": {"mean": sum(after) / len(after), "max": max(after)},
            "saturation": sum(layer["saturation"] for layer in compared) / len(compared),
        }
    return summary


def accuracies(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of each checkpoint on the word-order task, with its standard error."""
    return {
        model: {key: tasks["word-order"]["acc,none"][key] for key in ("value", "stderr")}
        for model, tasks in results["results"].items()
    }
