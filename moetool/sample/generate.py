"""Samples of a model, a batch at a time, by transformers' `generate` with its cache.

Shapes: B samples, P tokens of a prompt, S tokens that are generated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from moetool.errors import CheckpointError, DataError

TOLD_EVERY = 16  # tokens of a sample between two reports


def generate(
    model: Any,
    prompts_BP: Tensor,
    *,
    length: int,
    end: int,
    temperature: float,
    seed: int,
    tell: Callable[[int], None],
) -> list[list[int]]:
    """Continue prompts from a model's own distribution: no token is excluded or made less likely.

    What the model's own generation_config.json asks for (top-k, penalties) has no effect. The result is a pure
    function of the arguments, on one machine with one library.

    Args:
        model: a causal language model of transformers.
        prompts_BP: int64, of one length, so that nothing is filled up.
        length: S, the most tokens of a sample.
        end: the token with which a sample ends.
        temperature: divides the logits.
        seed: of the batch.
        tell: called with the tokens generated so far.

    Returns:
        The tokens generated for each prompt; the last is `end` where the model has ended the text.

    Raises:
        CheckpointError: the model gives no probabilities.
        DataError: it does not know a token of the prompts.
    """
    embedding = model.get_input_embeddings()
    if (unknown := int(prompts_BP.max())) >= embedding.num_embeddings:
        raise DataError(
            f"samples would begin with token {unknown}, but the model has {embedding.num_embeddings} tokens; use the"
            " tokenizer that belongs to the model"
        )
    prompts_BP = prompts_BP.to(embedding.weight.device)
    start = prompts_BP.shape[1]
    model.generation_config = GenerationConfig()  # whatever it sets would be added to what is asked for here
    asked = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    try:
        ids_BS = model.generate(
            prompts_BP,
            attention_mask=torch.ones_like(prompts_BP),
            generation_config=asked,
            stopping_criteria=StoppingCriteriaList([_Telling(start, end, tell)]),
        )[:, start:]
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        divided = f", divided by --temperature {temperature:g}," if temperature < 1 else ""
        raise CheckpointError(
            f"the model's logits{divided} are not finite, so nothing can be drawn from them;"
            f" {'raise --temperature, ' if divided else ''}check the checkpoint, or give another --dtype (float16"
            " overflows in many models)"
        ) from None
    lengths = _lengths(ids_BS, end).tolist()
    return [row[:own] for row, own in zip(ids_BS.tolist(), lengths, strict=True)]


def _lengths(ids_BS: Tensor, end: int) -> Tensor:
    """Tokens of each sample up to its first `end`, which fills up the rest."""
    return ((ids_BS == end).cumsum(1) == 0).sum(1).add(1).clamp(max=ids_BS.shape[1])


class _Telling(StoppingCriteria):
    """Stops nothing; it is how `generate` lets others know of each token."""

    def __init__(self, start: int, end: int, tell: Callable[[int], None]) -> None:
        self.start, self.end, self.tell = start, end, tell

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        if (input_ids.shape[1] - self.start) % TOLD_EVERY == 0:
            self.tell(int(_lengths(input_ids[:, self.start :], self.end).sum()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
