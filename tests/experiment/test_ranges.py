"""The range of every field of every config: its ends are in it, and what is just beyond is refused by name."""

import pytest

from grpo_jax import experiment
from grpo_jax.errors import UserError
from grpo_jax.experiment import LossConfig, SamplingConfig

VESPO, SAPO, DR, CISPO = (dict(loss_type=name) for name in ("vespo", "sapo", "dr_grpo", "cispo"))
BETA, SYNC = dict(beta=0.1), dict(beta=0.1, sync_ref_model=True)
CORRECTED = dict(importance_sampling_mode="token_mask")
RANGES = [
    # config, field, values in range, values out of range, other fields
    ("ScratchConfig", "alphabet", ("a", "ab"), ("", "aa"), {}),
    ("ScratchConfig", "hidden_size", (8,), (0, -8), {}),
    ("ScratchConfig", "num_layers", (1,), (0,), {}),
    ("ScratchConfig", "num_heads", (1, 2, 4), (0, 3, 8), {"hidden_size": 8}),
    ("LoRAConfig", "rank", (1,), (0,), {}),
    ("LoRAConfig", "targets", (("q",), ("q", "k", "v", "o", "gate", "up", "down")), ((), ("q", "x")), {}),
    ("PolicyConfig", "source", ("x",), ("",), {}),
    ("PolicyConfig", "perturbation", (0.0, 0.99), (-0.1, 1.0), {}),
    ("PolicyConfig", "revision", ("main", "refs/pr/1", "0123456789" * 4), ("", "../x", "a b", "/x"), {"source": "a/b"}),
    ("SamplingConfig", "temperature", (0.0, 9.0), (-0.1,), {}),
    ("SamplingConfig", "top_k", (0, 1), (-1,), {}),
    ("SamplingConfig", "top_p", (0.1, 1.0), (0.0, 1.1), {}),
    ("SamplingConfig", "max_tokens", (1,), (0,), {}),
    ("SamplingConfig", "max_logprob_difference", (None, 0.1), (0.0, -1.0), {}),
    ("OptimizerConfig", "learning_rate", (0.0, 1.0), (-0.1,), {}),
    ("OptimizerConfig", "warmup_steps", (0, 1), (-1,), {}),
    ("OptimizerConfig", "weight_decay", (0.0, 1.0), (-0.1,), {}),
    ("OptimizerConfig", "b1", (0.0, 0.99), (-0.1, 1.0), {}),
    ("OptimizerConfig", "b2", (0.0, 0.99), (-0.1, 1.0), {}),
    ("OptimizerConfig", "eps", (1e-9,), (0.0,), {}),
    ("OptimizerConfig", "max_grad_norm", (None, 0.1), (0.0, -1.0), {}),
    ("RewardConfig", "retries", (0, 1), (-1,), {}),
    ("RewardConfig", "max_failure_rate", (0.0, 1.0), (-0.1, 1.1), {}),
    ("RewardConfig", "time_limit", (0.1,), (0.0,), {}),
    ("EvaluationConfig", "splits", (("train",), ("train", "held_out")), ((),), {}),
    ("EvaluationConfig", "num_prompts", (1,), (0,), {}),
    ("EvaluationConfig", "num_samples", (1,), (0,), {}),
    ("EvaluationConfig", "temperature", (0.0,), (-0.1,), {}),
    ("EvaluationConfig", "every", (0, 1), (-1,), {}),
    ("EvaluationConfig", "batch_size", (1,), (0,), {}),
    ("GuardConfig", "spike_factor", (None, 1.1), (1.0, 0.0), {}),
    ("GuardConfig", "spike_window", (1, 10000), (0, 10001), {}),
    ("GuardConfig", "min_entropy", (None, 0.1), (0.0, -0.1), {}),
    ("GuardConfig", "max_most_common_ratio", (None, 0.1, 0.99), (0.0, 1.0), {}),
    ("GuardConfig", "patience", (1,), (0,), {}),
    ("LossConfig", "epsilon", (0.0, 1.0), (-0.1, 1.1), {}),
    ("LossConfig", "epsilon_high", (None, 0.0, 9.0), (-0.1,), {}),
    ("LossConfig", "delta", (None, 0.1), (0.0,), {}),
    ("LossConfig", "beta", (0.0, 1.0), (-0.1,), {}),
    ("LossConfig", "ref_model_mixup_alpha", (0.1, 1.0), (0.0, 1.1), SYNC),
    ("LossConfig", "ref_model_sync_steps", (1,), (0,), SYNC),
    ("LossConfig", "top_entropy_quantile", (0.0, 1.0), (-0.1, 1.1), {}),
    ("LossConfig", "dr_grpo_length", (1,), (None, 0), DR),
    ("LossConfig", "importance_sampling_mode", (None, "token_mask"), ("sequence_mask", "sequence_truncate"), VESPO),
    ("LossConfig", "importance_sampling_clip_max", (None, 0.1), (0.0,), CORRECTED),
    ("LossConfig", "importance_sampling_clip_min", (None, 0.0, 3.0), (-0.1, 3.1), CORRECTED),
    (
        "LossConfig",
        "importance_sampling_clip_min",
        (99.0,),
        (-0.1,),
        CORRECTED | {"importance_sampling_clip_max": None},
    ),
    ("LossConfig", "sapo_temperature_pos", (0.1,), (0.0,), SAPO),
    ("LossConfig", "sapo_temperature_neg", (0.1,), (0.0,), SAPO),
    *(
        ("LossConfig", f"vespo_{name}", (0.1,), (0.0,), VESPO)
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
    ),
    # What nothing reads may not be set.
    ("LossConfig", "epsilon", (0.2,), (0.1,), CISPO | {"epsilon_high": 5.0}),
    ("LossConfig", "epsilon", (0.1,), (), CISPO),
    ("LossConfig", "epsilon", (0.2,), (0.1,), SAPO),
    ("LossConfig", "epsilon_high", (5.0,), (), CISPO),
    ("LossConfig", "epsilon_high", (None,), (0.5,), SAPO),
    ("LossConfig", "delta", (None,), (1.5,), CISPO),
    ("LossConfig", "importance_sampling_level", ("sequence",), (), SAPO),
    ("LossConfig", "importance_sampling_level", ("token",), ("sequence",), dict(loss_type="reinforce")),
    ("LossConfig", "sapo_temperature_pos", (1.0,), (2.0,), VESPO),
    ("LossConfig", "vespo_k_pos", (2.0,), (1.0,), SAPO),
    ("LossConfig", "kl_estimator", ("k3",), ("k1", "k2"), {}),
    ("LossConfig", "kl_estimator", ("k1", "k2", "k3"), (), BETA),
    ("LossConfig", "use_bias_correction_kl", (False,), (True,), {}),
    ("LossConfig", "use_bias_correction_kl", (False, True), (), BETA),
    ("LossConfig", "sync_ref_model", (False,), (True,), {}),
    ("LossConfig", "ref_model_mixup_alpha", (0.6,), (0.5,), BETA),
    ("LossConfig", "ref_model_sync_steps", (512,), (4,), BETA),
    ("LossConfig", "importance_sampling_clip_min", (None,), (0.5,), {}),
    ("SFTConfig", "max_length", (2,), (None, 1), {"packing": True}),
    ("SFTConfig", "max_length", (None,), (8,), {}),
    ("RFTConfig", "threshold", (None,), (0.5,), {}),
    ("RFTConfig", "threshold", (0.5,), (None,), {"select": "threshold"}),
    ("PreferenceConfig", "noise_level", (0.0, 0.99), (-0.1, 1.0), {}),
    ("PreferenceConfig", "noise_level", (0.0, 2.0), (-0.1,), {"label_noise": "bradley_terry"}),
    ("PreferenceConfig", "noise_level", (0.0,), (0.1,), {"completions": "columns"}),
    ("PreferenceConfig", "label_noise", ("flip",), ("bradley_terry",), {"completions": "columns"}),
    ("PreferenceConfig", "epoch_steps", (None, 1), (0,), {}),
    ("DPOConfig", "beta", (0.1,), (0.0,), {}),
    ("DPOConfig", "label_smoothing", (0.0, 0.5), (-0.1, 0.51), {}),
    ("DPOConfig", "label_smoothing", (0.0, 0.49), (0.5,), {"loss_type": "robust"}),
    ("DPOConfig", "label_smoothing", (0.0,), (0.1,), {"loss_type": "ipo"}),
    ("RewardModelConfig", "center_rewards_coefficient", (0.0, 1.0), (-0.1,), {}),
    ("PPOConfig", "gamma", (0.0, 1.0), (-0.1, 1.1), {}),
    ("PPOConfig", "lam", (0.0, 1.0), (-0.1, 1.1), {}),
    ("PPOConfig", "cliprange_value", (None, 0.1), (0.0,), {}),
    ("PPOConfig", "vf_coef", (0.1,), (0.0,), {}),
    ("PPOConfig", "kl_coef", (0.0, 1.0), (-0.1,), {}),
]


@pytest.mark.parametrize(("config", "field", "right", "wrong", "others"), RANGES)
def test_the_range_of_a_field(config, field, right, wrong, others):
    make = getattr(experiment, config)
    for value in right:
        assert getattr(make(**{**others, field: value}), field) == value
    for value in wrong:
        with pytest.raises(UserError) as caught:
            make(**{**others, field: value})
        assert str(caught.value).startswith(f"{config}.{field} = {value!r} is out of range: it must be ")


def test_the_bound_of_a_log_probability_is_the_dtypes_unless_it_is_given():
    assert (SamplingConfig().logprob_bound("float32"), SamplingConfig().logprob_bound("bfloat16")) == (0.01, 1.0)
    assert SamplingConfig(max_logprob_difference=0.5).logprob_bound("float32") == 0.5


def test_the_first_field_that_is_wrong_is_the_one_that_is_named():
    with pytest.raises(UserError, match=r"LossConfig.epsilon = 2.0 is out of range: it must be between 0 and 1\."):
        LossConfig(epsilon=2.0, beta=-1.0)
    with pytest.raises(UserError, match=r"LossConfig.loss_type = 'ppo' has the wrong type: it must be Literal\['grpo'"):
        LossConfig("ppo", epsilon=2.0)
