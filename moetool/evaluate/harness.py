"""lm-eval's Hugging Face model, with progress, route counts and several processes.

Shapes: T tokens (batch x sequence, flattened).
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import set_torch_seed
from torch import Tensor

from moetool.errors import DataError, EvaluationError
from moetool.evaluate.tasks import FEWSHOT_SEED
from moetool.progress import Progress, silent
from moetool.routing.capture import Route, RouterCapture
from moetool.routing.stats import RoutingStats


class Harness(HFLM):
    """An already loaded model, evaluated exactly as lm-eval evaluates its path.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        folder: its checkpoint.
        batch_size: a number, `auto` or `auto:N`, as in lm-eval.
        routing: count the routes of each task (Mixture of Experts only).
        shared: the processes have one model together, so each answers every request; otherwise each has a model and
            a share of the documents.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: Path, batch_size: str, routing: bool, shared: bool = False
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        self.pretrained = str(folder.resolve())
        self.cache_hook = _Counter(self)
        self.capture = RouterCapture(model) if routing else None
        self._stats: RoutingStats | None = None
        if distributed.is_initialized() and not shared:
            self._rank, self._world_size = distributed.get_rank(), distributed.get_world_size()
        self._lengths: list[int | None] = []

    def run(
        self, name: str, task: Any, limit: float | None, allow_code_execution: bool, progress: Progress
    ) -> tuple[Any, RoutingStats | None]:
        """Evaluate one task.

        Returns:
            lm-eval's results with samples (None on processes other than the first), and the routes (None where
            none were counted).
        """
        num_documents = get_sample_size(task, limit) or len(task.eval_docs)
        if num_documents < self.world_size:
            raise EvaluationError(f"{num_documents} documents for {self.world_size} processes; launch fewer processes")
        self._progress, self._done, self._total = progress, 0, 0
        self._stats = None
        # The same settings as lm-eval's simple_evaluate.
        random.seed(0)
        np.random.seed(1234)
        set_torch_seed(1234)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            results = evaluate(self, {"tasks": {name: task}}, limit=limit, confirm_run_unsafe_code=allow_code_execution)
            parts = [part for part in self.gather_object(self._stats) or [] if part is not None]
            return results, sum(parts[1:], start=parts[0]) if parts else None
        finally:
            self._progress = silent
            task._instances = None

    # Progress: lm-eval's own bars are off; requests are counted where it records their answers.

    def advance(self, count: int) -> None:
        """Count answered requests."""
        self._done += count
        if self.rank == 0 and self._total:
            self._progress("requests", min(self._done, self._total), self._total)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._answer(super().loglikelihood, requests, len(requests))

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return self._answer(super().generate_until, requests, len(requests))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._counts_windows, self._num_tokens = True, 0
        try:
            answers = self._answer(super().loglikelihood_rolling, requests, 0)
        finally:
            self._counts_windows = False
        if self._num_tokens == 0:  # nothing was predicted: that would be the best possible score
            raise DataError("the tokenizer makes no tokens from any document; check the checkpoint's tokenizer")
        return answers

    def _answer(self, method: Any, requests: Any, total: int) -> Any:
        # With several processes lm-eval repeats the last request until all have the same number, as FSDP requires.
        # Here every process has the whole model, so the repetitions are not run or counted.
        last = requests[-1]
        same = next((n for n, request in enumerate(reversed(requests)) if request is not last), len(requests))
        extra = same - last.repeats if self.world_size > 1 else 0
        self._total = total
        world_size, self._world_size = self._world_size, 1
        try:
            answers = method(requests[: len(requests) - extra], disable_tqdm=True)
        finally:
            self._world_size = world_size
        return answers + answers[-1:] * extra

    _counts_windows, _num_tokens = False, 0
    _progress: Progress = staticmethod(silent)

    def tok_encode(self, *args: Any, **options: Any) -> Any:
        tokens = super().tok_encode(*args, **options)
        if self._counts_windows:  # all documents are tokenized before the first window is run
            self._num_tokens += len(tokens)
            self._total += math.ceil(len(tokens) / self.max_length)
        return tokens

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if self._counts_windows:
            self.advance(len(requests))
        return answers

    # Several processes: each has the whole model and a share of the documents.

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor).reshape(-1) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()

    # Routes. lm-eval pads on the right for log-likelihoods without telling the model, and on the left
    # for generation; padding is not text and must not count.

    def _count(self, routes: list[Route], mask_T: Tensor) -> None:
        if self._stats is None:
            self._stats = RoutingStats.like(routes)
        self._stats.update(routes, mask_T)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Any:
        if self.capture is None:
            return super()._model_call(inps, attn_mask, labels)
        with self.capture.collect() as self._routes:
            logits = super()._model_call(inps, attn_mask, labels)
        self._shape, self._lengths = inps.shape, []
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Any:
        # Called once per row of the last batch, in order, with the row's length without padding.
        if self.capture is not None:
            self._lengths.append(inplen)
            rows, columns = self._shape
            if len(self._lengths) == rows:
                lengths = torch.tensor(self._lengths)
                self._count(self._routes, (torch.arange(columns) < lengths[:, None]).flatten())
                self._routes = []
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        generate = super()._model_generate
        if self.capture is None:
            return generate(context, max_length, stop, **options)
        mask = _GenerationMask(self, context, stop)
        with self.capture.collect() as routes:

            def before(module: Any, args: Any, inputs: dict[str, Any]) -> None:
                routes.clear()
                mask.step(inputs["input_ids"], inputs.get("attention_mask"))

            def after(module: Any, args: Any, inputs: Any, output: Any) -> None:
                self._count(routes, mask.mask_T)
                routes.clear()

            handles = [
                self.model.register_forward_pre_hook(before, with_kwargs=True),
                self.model.register_forward_hook(after, with_kwargs=True),
            ]
            try:
                return generate(context, max_length, stop, **options)
            finally:
                for handle in handles:
                    handle.remove()


class _GenerationMask:
    """Marks the tokens of a generation step that are text: not padding, not after a row's end.

    A batch continues until its last row ends. Rows that ended earlier receive tokens that a batch of
    one would never see.
    """

    def __init__(self, lm: Harness, context: Tensor, stop: list[str]) -> None:
        eos = lm.model.generation_config.eos_token_id
        self.eos = torch.tensor([] if eos is None else eos).flatten()
        self.criteria = stop_sequences_criteria(lm.tokenizer, stop, context.shape[1], len(context))
        self.ids = context.cpu()
        self.ended = torch.zeros(len(context), dtype=torch.bool)
        self.prompt = True

    def step(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        ids = input_ids.cpu()
        text = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            text = attention_mask[:, -ids.shape[1] :].cpu().bool()
        if not self.prompt and len(ids) == len(self.ended):  # with beams, rows are not documents
            self.ids = torch.cat([self.ids, ids], dim=1)
            for criterion in self.criteria:
                criterion(self.ids, None)
                self.ended |= torch.tensor(criterion.done_tracker)
            self.ended |= torch.isin(ids[:, -1], self.eos)
            text &= ~self.ended[:, None]
        self.prompt = False
        self.mask_T = text.flatten()


class _Counter(CacheHook):
    """lm-eval reports each answered request to its cache; moetool counts them."""

    def __init__(self, lm: Harness) -> None:
        super().__init__(None)
        self.lm = lm

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if attr != "loglikelihood_rolling":
            self.lm.advance(1)
