"""Local lm-eval tasks, for the tests of `moetool eval`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["fox", "dog", "router", "token", "expert", "load", "number", "lazy", "quick", "brown"]


def save_task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    """A task NAME: NAME.yaml and NAME.jsonl in a folder; its data set cache is in the folder too."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents) + "\n", encoding="utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "hf")},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | settings), encoding="utf-8")


def metric(name: str, higher_is_better: bool = True, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def save_choices(folder: Path, name: str = "choices", number: int = 30, seed: int = 0) -> None:
    """Multiple choice with `acc` and `acc_norm`; few-shot examples from the same split."""
    draw = random.Random(seed)
    documents = [
        {
            "question": f"{i}. The {' '.join(draw.choices(WORDS, k=draw.randrange(1, 9)))} goes to",
            "choices": [" ".join(draw.choices(WORDS, k=draw.randrange(1, 4))) for _ in range(3)],
            "answer": draw.randrange(3),
        }
        for i in range(number)
    ]
    save_task(
        folder,
        name,
        documents,
        output_type="multiple_choice",
        fewshot_split="test",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[metric("acc"), metric("acc_norm")],
    )


def texts(number: int = 10, seed: int = 0) -> list[str]:
    """Documents of 1 to 200 words: some longer than the tiny models' 128 tokens."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 200))) + ".\n" for _ in range(number)]


def save_rolling(folder: Path, name: str = "rolling", number: int = 10) -> None:
    """Rolling log-likelihood with its three metrics."""
    names = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity"}
    save_task(
        folder,
        name,
        [{"text": text} for text in texts(number)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[metric(m, False, names.get(m, m)) for m in (*names, "bits_per_byte")],
    )


def save_generation(folder: Path, name: str = "generation", number: int = 8, **generation: Any) -> None:
    """Greedy generation with `exact_match`; prompts of different lengths."""
    draw = random.Random(1)
    save_task(
        folder,
        name,
        [{"prompt": " ".join(draw.choices(WORDS, k=draw.randrange(1, 12))), "answer": "fox"} for _ in range(number)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False} | generation,
        metric_list=[metric("exact_match")],
    )


def save_group(folder: Path, name: str, members: list[str]) -> None:
    """A group that averages its members' accuracy, weighted by size."""
    config = {
        "group": name,
        "task": members,
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
