"""The options of `moetool sample`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moetool.errors import ConfigError
from moetool.option import (
    check_device,
    device_map_option,
    device_option,
    document_option,
    dtype_option,
    flag,
    option,
    options,
    text_field_option,
)
from moetool.values import named, parse_count

PROMPTS, RUN = "Prompts", "How the model runs"
OF_PROMPTS = ("prompt_tokens", "text_field", "document")


@dataclass(frozen=True)
class SampleOptions:
    """The model, the text and how it is generated."""

    model: str = option(
        "The model to sample from: a folder, or owner/name\\[@revision].", positional=True, metavar="MODEL"
    )
    out: Path = option("The file to write. Each line is a JSON object.", positional=True, metavar="OUT.jsonl")
    max_tokens: int = option("Tokens to generate, such as 50M.", metavar="COUNT", parse=parse_count, defines=True)
    temperature: float = option("Sampling temperature; 1 keeps the model's own distribution.", 1.0, min=0, defines=True)
    seq_len: int | None = option(
        "Maximum length of a sample in tokens, including its prompt.",
        None, shown="2048, or the model's maximum if that is less", min=2, defines=True,
    )  # fmt: skip
    seed: int = option("Random seed; another seed gives different text.", 0, min=0, defines=True)
    overwrite: bool = option(
        "Replace OUT.jsonl once the new text is complete.", False, flag="--overwrite", recorded=False
    )
    prompts: Mapping[str, str] = option(
        "Text whose documents serve as prompts (repeatable; equal shares): a file, folder, glob or hf:owner/name."
        " Without it, samples start like new documents.",
        dict, panel=PROMPTS, metavar="NAME=PATH", make=named,
    )  # fmt: skip
    prompt_tokens: int = option(
        "Length of a prompt in tokens. Shorter documents are skipped.",
        32, panel=PROMPTS, min=1, defines=True,
    )  # fmt: skip
    text_field: str = text_field_option(PROMPTS, "the text of a prompt")
    document: Literal["file", "line", "paragraph"] = document_option(PROMPTS)
    batch_size: int = option("Number of samples generated at once.", 32, panel=RUN, min=1, defines=True)
    device: str = device_option(RUN)
    dtype: str = dtype_option("Dtype of the weights in memory; auto keeps the saved one.", RUN, defines=True)
    device_map: str | None = device_map_option(RUN)

    def check(self, typed: Collection[str]) -> None:
        """Refuse options that contradict each other.

        Raises:
            ConfigError: names them.
        """
        check_device(self)
        if self.temperature == 0:
            raise ConfigError("--temperature 0 would write the same text again and again; give a number above 0")
        if self.temperature == float("inf"):
            raise ConfigError("--temperature inf would draw tokens at random; give a finite number")
        if self.out.suffix != ".jsonl":
            raise ConfigError(f"OUT is {self.out}: give a name that ends in .jsonl, which says how the text is read")
        if not self.prompts:
            for name in OF_PROMPTS:
                if name in typed:
                    raise ConfigError(f"{flag(name)} has no effect without --prompts NAME=PATH")

    def identity(self, seq_len: int, model: str, prompts: Mapping[str, str]) -> dict[str, Any]:
        """The options that determine the text, by name.

        Args:
            seq_len: the longest sample.
            model: fingerprint of the checkpoint and its tokenizer.
            prompts: name -> digest of the tokens.
        """
        defining = {name: getattr(self, name) for name, one in options(self).items() if one.defines}
        if not prompts:
            del defining["prompt_tokens"]
        return {
            "model": model,
            "prompts": dict(prompts),
            **{flag(name)[2:]: value for name, value in (defining | {"seq_len": seq_len}).items()},
        }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options in which two identities differ, with both values where they say something."""
    changed = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old != new and name == "model":
            changed.append("MODEL (other files)")
        elif old != new and name == "prompts":
            changed.append("--prompts (other text)")
        elif old != new:
            changed.append(f"--{name} ({old} before, {new} now)")
    return changed
