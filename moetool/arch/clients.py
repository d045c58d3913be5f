"""Which programs compute a checkpoint as transformers does, by what was measured (docs/clients.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from moetool import registry
from moetool.arch.limits import Limit, not_silu, rope, windowed
from moetool.arch.spec import detect

# The name that `--for` takes -> the name that people read. docs/clients.md says which versions were measured.
CLIENTS = {"transformers-4": "transformers 4.57", "vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "mlx-lm"}


# Client -> the families in which positions scaled by yarn were measured to be exact.
YARN = {
    "vllm": frozenset(registry.names("target")),
    "llama.cpp": {"mixtral", "qwen3_moe", "granitemoe"},
    "mlx": {"granitemoe", "dots1"},
}


def _unmeasured_rope(client: str) -> Callable[[Mapping[str, Any]], bool]:
    def unmeasured(config: Mapping[str, Any]) -> bool:
        yarn = rope("yarn")(config) and config.get("model_type") in YARN[client]
        return not yarn and not rope("default", "llama3")(config)

    return unmeasured


# Of every family: what has not been measured in a client is not said to run there.
UNMEASURED = (
    *(Limit(client, "only SiLU has been measured there", not_silu) for client in ("vllm", "llama.cpp", "mlx")),
    *(
        Limit(client, "this way of scaling positions has not been measured there", _unmeasured_rope(client))
        for client in YARN
    ),
    Limit("mlx", "sliding windows have not been measured there", windowed),
)


def obstacles(config: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, str | None]:
    """Why each client would not compute a checkpoint as transformers 5 does.

    Args:
        config: config.json of a Mixture of Experts whose family moetool knows.
        beside: the names of the files beside it, and the special tokens of its tokenizer.

    Returns:
        The client's name -> the first reason, None where it was measured to be exact.

    Raises:
        LookupError: moetool knows nothing of the family.
    """
    spec = detect(config)
    if spec is None:
        raise LookupError(config.get("model_type"))
    holding = [limit for limit in (*spec.limits, *UNMEASURED) if limit.holds(config, beside)]
    return {client: next((limit.reason for limit in holding if limit.client == client), None) for client in CLIENTS}
