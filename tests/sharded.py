"""`python -m tests.sharded ...`: moetool, with accelerate's FSDP2 and DeepSpeed let onto CPU processes.

accelerate shares weights out on GPUs only: on a CPU it falls back to whole replicas without a word (which moetool
refuses). Here the processes are passed off as GPUs that talk through gloo, so that what shards, saves and
resumes is the code that runs on GPUs; that NCCL and CUDA do as well is not shown by it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


def _backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _tell_shards() -> None:
    """Print what each process holds after `prepare`, as JSON, so that a test sees that it is a share."""
    from moetool.train import build

    original = build.build_run

    def telling(plan: Any) -> Any:
        run = original(plan)
        shapes = {
            name: [list(parameter.shape), list(parameter.to_local().shape)]
            for name, parameter in run.core.named_parameters()
            if isinstance(parameter, DTensor)
        }
        shapes |= {  # ZeRO-3
            name: [list(parameter.ds_shape), list(parameter.ds_tensor.shape)]
            for name, parameter in run.core.named_parameters()
            if hasattr(parameter, "ds_shape")
        }
        moments = sum(state["exp_avg"].numel() for state in run.optimizer.state.values())
        total = sum(1 for _ in run.core.parameters())
        print(
            json.dumps({"rank": os.environ["RANK"], "parameters": total, "shards": shapes, "moments": moments}),
            file=sys.stderr,
        )
        return run

    build.build_run = telling


if __name__ == "__main__":
    PartialState._prepare_backend = _backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from moetool.cli import main

    _tell_shards()
    main()
