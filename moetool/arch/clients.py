"""Which programs compute a checkpoint as transformers does, according to measurements (docs/clients.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from moetool import registry
from moetool.arch.limits import Limit, not_silu, rope, windowed
from moetool.arch.spec import detect

# The name that `--for` takes -> the name that people read. docs/clients.md says which versions were measured.
CLIENTS = {"transformers-4": "transformers 4.57", "vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "mlx-lm"}


EVERY = frozenset(registry.names("target"))
# Where positions scaled by yarn or linearly are exact in llama.cpp.
LLAMA_CPP = {"mixtral", "qwen3_moe", "ernie4_5_moe", "lfm2_moe", "granitemoe", "granitemoehybrid", "granitemoe_swa"}
# Client -> a way of scaling positions -> the families in which it was measured to be exact, unless their own limits say
# otherwise. Without scaling, all are.
SCALED: dict[str, dict[str, Collection[str]]] = {
    "transformers-4": {"llama3": EVERY, "yarn": EVERY, "linear": EVERY},
    "vllm": {"llama3": EVERY, "yarn": EVERY, "linear": EVERY, "longrope": {"mixtral"}},
    "llama.cpp": {"llama3": EVERY, "yarn": LLAMA_CPP, "linear": LLAMA_CPP},
    "mlx": {"llama3": EVERY, "yarn": {"granitemoe", "dots1"}, "linear": {"granitemoe", "dots1"}},
}


def _unmeasured_rope(client: str) -> Callable[[Mapping[str, Any]], bool]:
    def unmeasured(config: Mapping[str, Any]) -> bool:
        measured = [kind for kind, families in SCALED[client].items() if config.get("model_type") in families]
        return not rope("default", *measured)(config)

    return unmeasured


# Of every family: what was not measured to be exact in a client is not said to run there.
UNMEASURED = (
    *(Limit(client, "only SiLU is known to be exact there", not_silu) for client in ("vllm", "llama.cpp", "mlx")),
    *(
        Limit(client, "this way of scaling positions is not known to be exact there", _unmeasured_rope(client))
        for client in SCALED
    ),
    Limit("mlx", "it computes sliding windows differently", windowed),
)


def obstacles(config: Mapping[str, Any], beside: Collection[str] = ()) -> dict[str, str | None]:
    """Why each client would not compute a checkpoint as transformers 5 does.

    Args:
        config: config.json of a Mixture of Experts whose family moetool knows.
        beside: the names of the files beside it, and the special tokens of its tokenizer.

    Returns:
        The client's name -> the first reason, None where it was measured to be exact.

    Raises:
        LookupError: moetool does not know the family.
    """
    spec = detect(config)
    if spec is None:
        raise LookupError(config.get("model_type"))
    holding = [limit for limit in (*spec.limits, *UNMEASURED) if limit.holds(config, beside)]
    return {client: next((limit.reason for limit in holding if limit.client == client), None) for client in CLIENTS}
