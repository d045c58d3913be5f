"""Tiny data sets in the schema of the real ones that the suites of `moetool eval` name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.tasks

from tests.hub import save_dataset

# The parts of BBH, as lm-eval names them.
BBH = sorted(file.stem for file in Path(lm_eval.tasks.__path__[0]).glob("bbh/cot_fewshot/[!_]*.yaml"))

BOTH, ALL = ("train", "validation"), ("train", "validation", "test")


def _rows(row: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The row, numbered wherever it says `#`."""

    def numbered(value: Any, i: int) -> Any:
        if isinstance(value, dict):
            return {key: numbered(part, i) for key, part in value.items()}
        if isinstance(value, list):
            return [numbered(part, i) for part in value]
        return value.replace("#", str(i)) if isinstance(value, str) else value

    return [numbered(row, i) for i in range(number)]


def save_suites(root: Path, number: int = 6) -> None:
    """Every data set of the suites, `number` documents a split."""

    def save(name: str, config: str, splits: tuple[str, ...], row: dict[str, Any]) -> None:
        save_dataset(root, name, config, {split: _rows(row, number) for split in splits})

    endings = ["eats # apples", "runs #", "sleeps", "sings [title] #"]
    hellaswag = {"activity_label": "Dogs", "ctx_a": "Dog # is here.", "ctx_b": "it", "endings": endings, "label": "1"}
    save("Rowan/hellaswag", "default", BOTH, hellaswag)
    save("alexandrainst/m_hellaswag", "de", ("val",), hellaswag)
    sentence = "The dog # saw the fox because _ was quick."
    save("allenai/winogrande", "winogrande_xl", BOTH,
         {"sentence": sentence, "option1": "the dog", "option2": "the fox", "answer": "2"})  # fmt: skip
    save("baber/piqa", "default", BOTH, {"goal": "Open box #", "sol1": "Lift the lid.", "sol2": "Sing.", "label": 0})
    choices = {"text": ["a dog", "a fox", "# tokens", "load"], "label": ["A", "B", "C", "D"]}
    for config in ("ARC-Easy", "ARC-Challenge"):
        save("allenai/ai2_arc", config, ALL,
             {"id": "#", "question": "What is #?", "choices": choices, "answerKey": "C"})  # fmt: skip
    save("allenai/swag", "regular", BOTH,
         {"startphrase": "The dog #", "label": 2} | {f"ending{i}": endings[i] for i in range(4)})  # fmt: skip
    save("EleutherAI/lambada_openai", "default", ("test",), {"text": "The quick brown fox # jumps over the lazy dog"})
    save("allenai/sciq", "default", ALL,
         {"question": "What is #?", "distractor1": "a", "distractor2": "b", "distractor3": "# c",
          "correct_answer": "load", "support": " It is load."})  # fmt: skip
    save("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", ALL,
         {"QUESTION": "Does # help?", "CONTEXTS": ["Tried.", "It did #."], "final_decision": "maybe"})  # fmt: skip
    save("regisss/math_qa", "default", ALL,
         {"Problem": "# + 1 = ?", "options": "a ) 1 , b ) 2 , c ) # , d ) 4 , e ) 5", "correct": "c"})  # fmt: skip
    save("alexandrainst/m_arc", "de", ALL,
         {"id": "#", "instruction": "Was ist #?", "answer": "B"}
         | {f"option_{x}": f"{x} #" for x in "abcd"} | {"option_e": None})  # fmt: skip
    save("alexandrainst/m_truthfulqa", "de", ("val",),
         {"question": "Was ist #?", "mc1_targets_choices": ["ja", "nein"],
          "mc2_targets_choices": ["ja", "ja #", "nein"], "mc2_targets_labels": [1, 1, 0]})  # fmt: skip
    save("openai/openai_humaneval", "openai_humaneval", ("test",),
         {"task_id": "#", "prompt": "def add(a, b):\n    return a + b * (# % 2)\n", "entry_point": "add",
          "canonical_solution": "", "test": "def check(f):\n    assert f(1, 2) == 3\n"})  # fmt: skip
    save("allenai/openbookqa", "main", ALL,
         {"question_stem": "The # is", "choices": choices, "answerKey": "D"})  # fmt: skip
    save("mandarjoshi/trivia_qa", "rc.nocontext", BOTH,
         {"question": "Who is #", "answer": {"aliases": ["Fox #", ""], "value": "Fox"}})  # fmt: skip
    save("lighteval/squad_v2", "default", BOTH,
         {"id": "#", "title": "T", "context": "It is #.", "question": "What is it?",
          "answers": {"text": [], "answer_start": []}})  # fmt: skip
    save("Muennighoff/xwinograd", "en", ("test",),
         {"sentence": sentence, "option1": "the dog", "option2": "the fox", "answer": "2"})  # fmt: skip
    for config in BBH:
        save("SaylorTwift/bbh", config, ("test",), {"input": "Is it #?", "target": "yes"})
    save("Rakuten/JGLUE", "JSQuAD", BOTH,
         {"context": "題 [SEP] それは#です。", "question": "何ですか", "answers": {"text": ["#"]}})  # fmt: skip
    save("mkshing/xlsum_ja", "default", ALL, {"text": "長い文#。", "summary": "文#。"})


def save_metrics(root: Path) -> None:
    """The two metrics that the suites' tasks take from the hub; our own, and as strict as the real ones."""
    for name, code in {"code_eval": CODE_EVAL, "squad_v2": SQUAD}.items():
        folder = root / "evaluate-metric" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(code)


CODE_EVAL = """
import os

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": datasets.Sequence(text), "references": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, k):
        if os.getenv("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("#####\\n\\nThis runs code that a model wrote.")
        passed = []
        for (candidate,), reference in zip(predictions, references):
            try:
                exec(candidate + "\\n" + reference, {})
                passed.append(1.0)
            except Exception:
                passed.append(0.0)
        return {"pass@1": sum(passed) / len(passed)}, {}
"""

SQUAD = """
import datasets
import evaluate


class Squad(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        answers = datasets.Features({"text": datasets.Sequence(text), "answer_start": datasets.Sequence(datasets.Value("int32"))})
        prediction = {"id": text, "prediction_text": text, "no_answer_probability": datasets.Value("float32")}
        features = datasets.Features({"predictions": prediction, "references": {"id": text, "answers": answers}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        right = [p["prediction_text"] in (r["answers"]["text"] or [""]) for p, r in zip(predictions, references)]
        return dict.fromkeys(["exact", "f1", "NoAns_exact", "NoAns_f1"], 100.0 * sum(right) / len(right))
"""  # noqa: E501
