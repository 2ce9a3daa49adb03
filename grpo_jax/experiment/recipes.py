"""Published variants of GRPO, as the fields of an experiment that make them.

    Experiment(task=..., rewards=..., **recipes.dapo())
    Experiment(task=..., rewards=..., **{**recipes.gspo(), "group_size": 8, "prompts_per_step": 16})

A recipe sets what is the algorithm: the loss, the advantages, the size of a group, how many updates a batch has, and
where the KL goes. It does not set what belongs to the paper's policy and task: the optimizer (papers that train models
of billions of parameters use AdamW at about 1e-6), the length of completions, how many steps. A batch must have as many
groups as mini-batches, or groups that can be split: `prompts_per_step * group_size` a multiple of `num_minibatches`.

What all recipes depart in from their papers: the denominators of a loss count a whole (mini-)batch (see
`grpo_jax.losses.policy_gradient`), nothing is added to a standard deviation, which is the population's (`ddof=0`), and
mini-batches hold whole groups where papers shuffle single completions.
"""

from typing import Any

from grpo_jax.experiment.methods import AdvantageConfig, LossConfig

Recipe = dict[str, Any]


def grpo(*, group_size: int = 64, beta: float = 0.04) -> Recipe:
    """GRPO as DeepSeekMath trained with it (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.2).

    Groups of 64, one update for each batch, and a KL of 0.04 (k3) in the loss. With one update the clipping never acts.
    """
    return dict(method="grpo", group_size=group_size, loss=LossConfig("grpo", beta=beta), advantages=AdvantageConfig())


def dr_grpo(max_tokens: int, *, group_size: int = 8, num_minibatches: int = 8) -> Recipe:
    """Dr. GRPO: no division by the length, none by the deviation (Liu et al. 2025, https://arxiv.org/abs/2503.20783).

    Groups of 8, no KL, and, as in its published scripts, eight updates on a batch of 128 prompts.

    Args:
      max_tokens: the constant by which a completion's sum is divided, usually the experiment's `sampling.max_tokens`.
        The paper divides by no number at all, which is another scale of the loss, and so of the learning rate alone.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        loss=LossConfig("dr_grpo", dr_grpo_length=max_tokens),
        advantages=AdvantageConfig(scale="none"),
    )


def dapo(*, group_size: int = 16, num_minibatches: int = 16, dynamic_sampling_rounds: int = 9) -> Recipe:
    """DAPO (Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 4.1).

    Clip-higher (0.2 and 0.28), a mean over tokens, no KL, dynamic sampling, groups of 16, and sixteen updates on a
    batch of 512 prompts. Departures:

    - The paper samples until a batch has no group without a signal. Here a step plays at most
      `dynamic_sampling_rounds` further rounds (published configs stop after ten batches), and then keeps what it has.
    - The soft punishment of overlong completions is a reward of the experiment's: add
      `grpo_jax.rewards.length.soft_overlong_punishment`, or an own one. The paper's ablation also has a filter instead,
      `loss.mask_truncated_completions`.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        dynamic_sampling_rounds=dynamic_sampling_rounds,
        loss=LossConfig("dapo", epsilon=0.2, epsilon_high=0.28),
        advantages=AdvantageConfig(),
    )


def gspo(*, group_size: int = 16, num_minibatches: int = 4) -> Recipe:
    """GSPO: ratios and clipping of whole sequences (Zheng et al. 2025, https://arxiv.org/abs/2507.18071, section 5.1).

    Ratios are clipped at 3e-4 below and 4e-4 above 1, four updates for each batch, no KL. The paper does not state the
    size of its groups; 16 is chosen here.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        loss=LossConfig("grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
        advantages=AdvantageConfig(),
    )


def cispo(*, group_size: int = 16, num_minibatches: int = 16, epsilon_high: float = 5.0) -> Recipe:
    """CISPO: bounded weights, so that every token has a gradient (MiniMax-M1, https://arxiv.org/abs/2506.13585).

    MiniMax-M1 makes sixteen updates for each batch and states no bound; 5 is that of ScaleRL
    (https://arxiv.org/abs/2510.13786). The size of groups is DAPO's, to which the paper compares itself; its dynamic
    sampling and length penalty are left out: set `dynamic_sampling_rounds`, and add a reward.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        loss=LossConfig("cispo", epsilon_high=epsilon_high),
        advantages=AdvantageConfig(),
    )


def rloo(*, group_size: int = 4, kl_coef: float = 0.03) -> Recipe:
    """RLOO (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740): REINFORCE with the mean of the others as baseline.

    The KL of a completion goes into its reward, with 0.03 (the paper's TL;DR; 0.10 for its HH); groups of four; one
    update for each batch. TRL's RLOO has clipped ratios besides, which with one update are 1.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        loss=LossConfig("reinforce"),
        advantages=AdvantageConfig(scale="none", baseline="leave_one_out", kl_coef=kl_coef),
    )


def reinforce_pp(*, kl_coef: float = 0.01, num_minibatches: int = 8) -> Recipe:
    """REINFORCE++ (Hu et al. 2025, https://arxiv.org/abs/2501.03262): one completion of each prompt, and no baseline.

    A token's advantage is its completion's reward less the KL from there on, scaled over the whole batch (eq. 8 to 10),
    with PPO's clipping at 0.2 and a mean over tokens. 0.01 is the default of its published code, and eight updates
    for each batch are that code's 1024 completions in batches of 128.
    """
    return dict(
        method="grpo",
        group_size=1,
        num_minibatches=num_minibatches,
        loss=LossConfig("dapo"),
        advantages=AdvantageConfig(scale="whiten", baseline="none", kl_coef=kl_coef, kl_level="token"),
    )


def reinforce_pp_baseline(*, group_size: int = 8, beta: float = 1e-3, num_minibatches: int = 8) -> Recipe:
    """REINFORCE++ with the group's mean as baseline (https://arxiv.org/abs/2501.03262), for several completions.

    The reward less its group's mean, scaled over the whole batch; the KL (k2) is in the loss. The size of groups and
    `beta` are chosen here.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        loss=LossConfig("dapo", beta=beta, kl_estimator="k2"),
        advantages=AdvantageConfig(scale="whiten"),
    )


def lite_ppo(*, group_size: int = 8, num_minibatches: int = 8) -> Recipe:
    """Lite PPO (Liu et al. 2025, https://arxiv.org/abs/2508.08221): two techniques on a critic-free PPO.

    The group's mean as baseline with the deviation of the whole batch, and a mean over tokens; no KL. The size of
    groups and the number of updates are chosen here.
    """
    return dict(
        method="grpo",
        group_size=group_size,
        num_minibatches=num_minibatches,
        loss=LossConfig("dapo"),
        advantages=AdvantageConfig(scale="batch"),
    )
