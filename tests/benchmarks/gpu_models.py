"""What `tests.benchmarks.gpu` runs on: its models, its text, and the loops that a user would write.

    python -m tests.benchmarks.gpu_models machine|text|dense|checked|bare|routes JSON

Each is a process of its own; the last line of its output is one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY = 2048  # of the tokenizer; no model has fewer rows
LR = 1e-4

# The two models of the published figures, by the family of the dense parent.
GEOMETRY: dict[str, dict[str, Any]] = {
    "qwen3": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
}
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# For the checks: large enough for a GPU's kernels, small enough to run many at once.
CHECKED = TINY | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
}
EXPERTS, TOP_K = 8, 2


def geometry(family: str, tiny: bool) -> dict[str, Any]:
    """The configuration of a dense parent."""
    return GEOMETRY[family] | (TINY if tiny else {})


def flops_per_token(shape: dict[str, Any], seq_len: int) -> int:
    """6 N + 12 L H Q S (PaLM, appendix B) of the upcycled model, counted from its shape alone.

    N are the parameters that one token uses, without the embedding, which is looked up, and with the head.
    """
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    attention = 2 * hidden * shape["head_dim"] * (heads + shape["num_key_value_heads"])
    experts = TOP_K * 3 * hidden * shape["intermediate_size"] + hidden * EXPERTS
    used = layers * (attention + experts) + hidden * shape["vocab_size"]
    return int(6 * used + 12 * layers * heads * shape["head_dim"] * seq_len)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def save_random(model_type: str, shape: dict[str, Any], folder: Path, tokenizer: Path, dtype: str) -> dict[str, Any]:
    """Write a random model and a copy of the tokenizer; returns its parameters."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    more = {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(shape | more)), dtype=dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return {"parameters": int(model.num_parameters())}


def dense(folder: str, tokenizer: str, family: str, tiny: bool) -> dict[str, Any]:
    """The dense parent of one of the two models, in bf16."""
    return save_random(family, geometry(family, tiny), Path(folder), Path(tokenizer), "bfloat16")


def machine() -> dict[str, Any]:
    """The GPU's name, and the bf16 operations a second that moetool knows of it."""
    import torch

    from moetool.cost.devices import peak_flops

    if not torch.cuda.is_available():
        return {"device": "CPU", "flops": None}
    return {"device": torch.cuda.get_device_name(), "flops": peak_flops(torch.device("cuda"), "bf16")}


def checked(folder: str, tokenizer: str, file: str, tiny: bool) -> dict[str, Any]:
    """A small Mixtral in fp32, for the checks; the text's tokens are in the cache from then on."""
    shape = (TINY if tiny else CHECKED) | {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    made = save_random("mixtral", shape, Path(folder), Path(tokenizer), "float32")
    return made | {"tokens": len(tokens(folder, file))}


def text(file: str, tokenizer: str, characters: int) -> dict[str, Any]:
    """The standard library's code as JSONL, and a tokenizer trained on its beginning."""
    from moetool.data.installed import code
    from moetool.quickstart import train_tokenizer

    documents = code(characters)
    Path(file).write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    trained = train_tokenizer(documents[:40])
    trained.save_pretrained(tokenizer)
    return {"documents": len(documents), "vocabulary": len(trained)}


def tokens(model: str, file: str) -> Any:
    """The text as one array of tokens, as moetool cuts it."""
    from moetool.data.make_tokens import tokenized
    from moetool.data.text import TextSource

    stream = tokenized(TextSource(file, "text", "file"), Path(model))
    return stream.read(0, stream.num_tokens)


def bare(model: str, file: str, seq_len: int, batch: int, steps: int) -> dict[str, Any]:
    """What a user would write: fp32 weights under bf16 autocast, fused AdamW, checkpointing, one sequence at a time."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    began, where = time.perf_counter(), device()
    ids = torch.from_numpy(tokens(model, file).astype("int64"))
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(where).train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, start = [], time.perf_counter() - began
    for step in range(steps):
        began = time.perf_counter()
        for number in range(batch):
            at = (step * batch + number) * seq_len % (len(ids) - seq_len - 1)
            window = ids[None, at : at + seq_len + 1].to(where)
            with torch.autocast(where, torch.bfloat16, enabled=where == "cuda"):
                logits = net(input_ids=window[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten()) / batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as every loop that shows its loss
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else None
    return {"step_seconds": seconds, "load_seconds": start, "peak": peak}


def routes(model: str, file: str, num_tokens: int, seq_len: int, batch: int) -> dict[str, Any]:
    """Routes to each expert of each layer in a bare forward of transformers, from its own router logits."""
    import torch
    from transformers import AutoModelForCausalLM

    began, where = time.perf_counter(), device()
    ids = torch.from_numpy(tokens(model, file)[:num_tokens].astype("int64"))
    windows = ids[: len(ids) // seq_len * seq_len].reshape(-1, seq_len)
    net = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(where).eval()
    start, counts = time.perf_counter() - began, None
    with torch.no_grad():
        for rows in windows.split(batch):
            out = net.base_model(input_ids=rows.to(where), use_cache=False, output_router_logits=True)
            chosen = [logits.float().topk(TOP_K, dim=-1).indices.flatten() for logits in out.router_logits]
            here = torch.stack([torch.bincount(experts, minlength=EXPERTS) for experts in chosen])
            counts = here if counts is None else counts + here
    assert counts is not None, "the text is shorter than one window"
    return {
        "counts": counts.tolist(),
        "num_tokens": windows.numel(),
        "load_seconds": start,
        "forward_seconds": time.perf_counter() - began - start,
    }


JOBS = {"machine": machine, "dense": dense, "checked": checked, "text": text, "bare": bare, "routes": routes}


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)  # type: ignore[operator]
