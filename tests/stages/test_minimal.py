"""Compare stages/minimal.py with the real stages: equal losses and gradients on one batch."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data.groups import PromptGroup, batch_groups, make_rows
from stages import minimal
from tests.builders import EOS, IDS, PAD, tiny_causal, tiny_scalar

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 19, 12, 6], [11, 4]]
RESPONSES = [[14, EOS], [30, 31, 32, 33, EOS], [EOS], [22, 23, 24]]  # the last one was cut off
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [10, 11, 12], "labels": [-100, 11, 12]},
]
GROUPS = [
    PromptGroup([5, 9, 2], [[14, 1], [30, 31, 32, 1], [15, 1]], ranks=(2, 1, 3), more_ranks=((1, 1, 2),)),
    PromptGroup([7], [[8, 9, 1], [22, 23]], ranks=(1, 2)),
]
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward())


class Real:
    """The real stages on one batch; only this class knows their signatures."""

    @staticmethod
    def sft(policy, rows: list[dict], folder):
        """Return the loss that SFT's trainer computes for a padded batch of rows."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from stages.training.text import with_plain_loss
        from tests.builders import tiny_tokenizer

        args = SFTConfig(
            output_dir=str(folder),
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=True,
            bf16=False,
            report_to="none",
            activation_checkpointing=False,
        )
        trainer = with_plain_loss(SFTTrainer)(
            model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
        )
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([r["input_ids"] + [PAD] * (width - len(r["input_ids"])) for r in rows])
        labels = torch.tensor([r["labels"] + [-100] * (width - len(r["labels"])) for r in rows])
        batch = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
        return trainer.compute_loss(policy, batch, num_items_in_batch=int((labels[:, 1:] != -100).sum()))

    @staticmethod
    def reward_loss(model, groups: list[PromptGroup], packed: bool):
        """Return the reward model's loss of one batch of groups."""
        from stages.models.forward import response_scores
        from stages.settings.rm import RMSettings
        from stages.training.ranking import loss_of

        batch = batch_groups(groups, PAD, packed=packed)
        return loss_of(RMSettings(), batch, response_scores(model, batch.rows), len(groups))

    @staticmethod
    def preference_loss(policy, ref_policy, groups: list[PromptGroup], packed: bool):
        """Return DPO's loss of one batch of groups."""
        from stages.dpo import loss_of
        from stages.models.forward import response_logprobs
        from stages.objectives.logprobs import sequence_logps

        batch = batch_groups(groups, PAD, packed=packed)
        mask = batch.rows.response_mask
        logps = sequence_logps(response_logprobs(policy, batch.rows), mask)
        with torch.no_grad():
            ref_logps = sequence_logps(response_logprobs(ref_policy, batch.rows), mask)
        return loss_of("sigmoid", logps, ref_logps, batch, minimal.BETA, 0.0, len(groups), 1.0)

    @staticmethod
    def ppo_gradients(policy, value_model, episodes, rows: list[dict], packed: bool) -> dict[str, float]:
        """Accumulate the PPO and ptx gradients of one minibatch; return their figures."""
        from stages.models.roles import Roles
        from stages.ppo.options import update_options
        from stages.ppo.update import Batch, ppo_gradients, ptx_gradient, read
        from stages.rollouts.rollout import Rollout
        from stages.settings.ppo import PPOSettings
        from stages.training.trainee import gradients_of, make_trainee, total_norm

        config = PPOSettings(
            total_episodes=4,
            batch_size=4,
            mini_batch_size=4,
            per_device_train_batch_size=3,
            cliprange=minimal.CLIPRANGE,
            ptx_coef=minimal.PTX_COEF,
        )
        options = update_options(config, seed=3)
        roles = Roles(policy, None, {}, value_model, IDS, ACCELERATOR, packed=packed)
        mask = episodes.rows.response_mask
        zeros = torch.zeros_like(episodes.logprobs)
        rollout = Rollout(
            prompts=PROMPTS,
            responses=RESPONSES,
            prompt_ids=list(range(len(PROMPTS))),
            mask=mask,
            logprobs=episodes.logprobs,
            ref_logprobs=zeros,
            values=episodes.values,
            entropy=zeros,
            scores=zeros[:, 0],
            finished=torch.tensor([y[-1] == EOS for y in RESPONSES]),
        )
        trainee = make_trainee("policy", policy, learning_rate=1e-2, max_grad_norm=1e9)
        batch = Batch(rollout, episodes.advantages, episodes.returns)
        parts = ppo_gradients(roles, batch, [0, 1, 2, 3], options)
        norms = {"grad_norm/ppo": total_norm(gradients_of(trainee.parameters.values()))}
        ptx = ptx_gradient(roles, trainee, [row["input_ids"] for row in rows], options)
        return read(parts + ptx.parts, norms | {"grad_norm/ptx": ptx.norm}, [], ptx, 1.0)[0]


def scalar_model(model) -> minimal.ScalarModel:
    """Return minimal's view of a reward or value model; the weights are the same tensors."""
    return minimal.ScalarModel(model.model, model.score, model.config.reward_bias)


def gradients(model) -> dict[str, torch.Tensor]:
    """Return the gradients by name and clear them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found


def assert_same(model, losses) -> None:
    """Assert that two losses are one number and leave one gradient in each weight of `model`.

    Args:
        model: What trains; its gradients are clear.
        losses: Two functions without arguments that return a loss.
    """
    values, found = [], []
    for loss in losses:
        value = loss()
        value.backward()
        values.append(value.item())
        found.append(gradients(model))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert_close(*found)


def assert_close(one: dict, other: dict) -> None:
    """Assert that gradients agree, and that there are some."""
    assert one.keys() == other.keys() and any(g.abs().max() > 1e-4 for g in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(params=["padded", "packed"])
def packed(request) -> bool:
    """The layouts of the real stages; minimal pads."""
    return request.param == "packed"


def prepare(packed: bool, *models) -> None:
    """Tell packed models to read rows as packed ones."""
    from stages.models.packing import can_pack

    if packed:
        assert all([can_pack(model, 64) for model in models])


def test_sft(tmp_path):
    policy = tiny_causal(vocab_size=300)
    assert_same(policy, (lambda: Real.sft(policy, ROWS, tmp_path), lambda: minimal.text_loss(policy, ROWS, pad_id=PAD)))


def test_reward_model(packed):
    model = tiny_scalar(seed=1, bias=0.3)
    prepare(packed, model)
    batch = batch_groups(GROUPS, PAD)
    assert_same(
        model,
        (lambda: Real.reward_loss(model, GROUPS, packed), lambda: minimal.reward_loss(scalar_model(model), batch)),
    )


def test_dpo(packed):
    policy, ref_policy = tiny_causal(), tiny_causal(seed=1)
    prepare(packed, policy, ref_policy)
    batch = batch_groups(GROUPS, PAD)
    assert_same(
        policy,
        (
            lambda: Real.preference_loss(policy, ref_policy, GROUPS, packed),
            lambda: minimal.preference_loss(policy, ref_policy, batch),
        ),
    )


def test_ppo(packed):
    policy, value_model = tiny_causal(), tiny_scalar(seed=2, bias=0.1)
    prepare(packed, policy, value_model)
    rows = make_rows(PROMPTS, RESPONSES, PAD)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(rows.responses.shape, generator=generator) for _ in range(4)]
    with torch.no_grad():  # old numbers lie off the present ones, so that clips are at work
        logprobs = minimal.response_logprobs(policy, rows) + 0.3 * noise[0]
        values = minimal.response_values(scalar_model(value_model), rows) + 0.3 * noise[1]
    episodes = minimal.Episodes(rows, logprobs, values, noise[2], noise[3])
    text = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [9, 10, 11, 12])]

    figures = Real.ppo_gradients(policy, value_model, episodes, text, packed)
    expected = gradients(policy), gradients(value_model)
    surrogate, value_error = minimal.ppo_losses(policy, scalar_model(value_model), episodes)
    ptx_loss = minimal.text_loss(policy, text, PAD)
    (surrogate + minimal.PTX_COEF * ptx_loss).backward()
    value_error.backward()
    found = gradients(policy), gradients(value_model)

    assert figures["policy/clipfrac_avg"] > 0 and figures["val/clipfrac_avg"] > 0
    for name, loss in (("loss/policy_avg", surrogate), ("loss/value_avg", value_error), ("loss/ptx", ptx_loss)):
        assert figures[name] == pytest.approx(loss.item(), rel=1e-4), name
    for one, other in zip(expected, found, strict=True):
        assert_close(one, other)


def test_a_minibatch_is_the_same_episodes():
    """Losses of two minibatches, weighted by their tokens, add up to the loss of the batch."""
    policy, value_model = tiny_causal(), scalar_model(tiny_scalar(seed=2))
    rows = make_rows(PROMPTS, RESPONSES, PAD)
    numbers = torch.randn(4, *rows.responses.shape, generator=torch.Generator().manual_seed(0))
    episodes = minimal.Episodes(rows, *(numbers - 2.0))
    total = minimal.ppo_losses(policy, value_model, episodes)
    tokens = int(rows.lengths.sum())
    parts = [torch.tensor([3, 1]), torch.tensor([0, 2])]
    losses = [minimal.ppo_losses(policy, value_model, episodes.select(index)) for index in parts]
    for k in range(2):
        weighted = [int(rows.lengths[i].sum()) / tokens * loss[k] for i, loss in zip(parts, losses, strict=True)]
        torch.testing.assert_close(sum(weighted), total[k])


def test_samples_end_at_eos_or_at_the_length_limit():
    torch.manual_seed(0)
    responses = minimal.sample(tiny_causal(initializer_range=0.02), PROMPTS * 16, IDS)
    assert len(responses) == 64 and all(EOS not in y[:-1] for y in responses)
    assert {y[-1] == EOS for y in responses if len(y) < minimal.R} == {True}
    assert max(map(len, responses)) == minimal.R


@pytest.mark.slow
@pytest.mark.exhaustive  # the demo's test trains a chain too
def test_the_chain_improves():
    """Run the whole file: SFT answers better than base, and PPO and DPO better than SFT."""
    scores = minimal.main()
    assert scores["base"] < scores["sft"] < min(scores["ppo"], scores["dpo"])
