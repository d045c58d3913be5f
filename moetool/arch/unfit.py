"""Why other decoders of transformers cannot be upcycled."""

from __future__ import annotations

# Reason, to follow "because" -> model types. docs/models.md has the same reasons in a table.
UNFIT: dict[str, tuple[str, ...]] = {
    "it is already a Mixture of Experts": (
        "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
        "granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text",
        "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "mellum",
        "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe",
        "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "solar_open",
        "zaya",
    ),
    "its FFN has no gate, but the experts of all stock MoE families have one": (
        "apertus", "arcee", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
        "blenderbot-small", "bloom", "camembert", "codegen", "ctrl", "data2vec-text", "electra", "ernie", "falcon",
        "fuyu", "git", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "jais2",
        "marian", "mbart", "megatron-bert", "mpt", "musicgen", "musicgen_melody", "mvp", "nanochat", "nemotron",
        "nemotron_h", "openai-gpt", "opt", "pegasus", "persimmon", "phi", "plbart", "prophetnet", "reformer",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "starcoder2", "trocr", "whisper",
        "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ),
    "it has recurrent or state-space layers, which no stock MoE family has": (
        "bamba", "falcon_h1", "falcon_mamba", "mamba", "mamba2", "olmo_hybrid", "recurrent_gemma", "rwkv",
        "xlstm", "zamba", "zamba2",
    ),
    "the weights of its own experts never sum to 1, so copies would not reproduce the dense model": ("jamba",),
    "it scales embeddings and its norms multiply by 1 + weight, and no stock MoE family does both": (
        "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "vaultgemma",
    ),
    "its family norms experts and the dense FFN separately, so copies would not reproduce the dense model": (
        "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text",
    ),
    "it is a draft model that shares another model's keys and values": (
        "gemma4_assistant", "gemma4_unified_assistant",
    ),
    "no stock MoE family in which copies of an FFN compute that FFN has its layer norms": (
        "modernbert-decoder", "olmo", "stablelm",
    ),
    "it norms after attention and FFN, with windows or per-head norms that flex_olmo does not have": (
        "exaone4", "olmo3",
    ),
    "it norms before and after attention and FFN, which no stock MoE family with its attention does": (
        "glm4", "hyperclovax", "lfm3",
    ),
    "its positions rotate neighbouring pairs in part of each head, which no stock MoE family does": ("glm",),
    "it has two kinds of positions, one for each kind of layer": ("cohere_compass_text",),
    "it scales queries by their position (llama_4_scaling_beta)": ("ministral3",),
    "it has latent attention (MLA), which no target family has": ("minicpm3", "youtu"),
    "it has its own kind of attention": ("bitnet", "cpmant", "diffllama", "doge"),
    "it is more than one text decoder": ("blt", "emu3", "hrm_text", "mllama", "moshi"),
    "its layers contain adapters for images and sound": ("phi4_multimodal",),
}  # fmt: skip


def why_unfit(model_type: object) -> str | None:
    """The reason for a model type; None if it is not known."""
    return next((reason for reason, names in UNFIT.items() if model_type in names), None)
