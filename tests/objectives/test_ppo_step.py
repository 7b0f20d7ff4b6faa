"""Check one PPO-ptx update of a tiny model.

Its gradients by another route, ratio 1 at the start, ptx added and not mixed.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from data.groups import make_rows
from pipeline.errors import TrainingStopped, UserError
from stages.models.forward import response_logprobs
from stages.models.packing import can_pack
from stages.models.roles import Roles
from stages.ppo import update as ppo_update
from stages.ppo.figures import describe, not_finite_episodes
from stages.ppo.options import Correction, UpdateOptions, update_options
from stages.ppo.run import correct
from stages.ppo.sampling import preflight
from stages.ppo.update import Batch, Learners, Rates, minibatches, ppo_gradients, ptx_gradient, read, update
from stages.rollouts import transformers
from stages.rollouts.collect import reference_logprobs
from stages.rollouts.engine import EngineLost, Sampled
from stages.settings import ppo as ppo_settings
from stages.settings.rollout import RolloutSettings
from stages.training.readings import read_sums
from stages.training.trainee import Average, Skips, gradients_of, make_trainee, total_norm
from tests.builders import EOS, PAD, build, tiny_config
from tests.ppo_sampler import SEED, drawn, sampler_of

VOCAB = 24
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 19, 12, 6], [11, 4]]
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward())
CLOSE = {"rtol": 2e-3, "atol": 2e-6}  # fp32 models: log-probs are taken in fp32


def config(**changed):
    small = {
        "total_episodes": 8,
        "batch_size": 8,
        "mini_batch_size": 4,
        "per_device_train_batch_size": 3,
        "samples_per_prompt": 2,
        "response_length": 5,
        "max_length": 32,
        "ptx_coef": 2.0,
        "ptx_ratio": 1.0,
        "learning_rate": 1e-2,
        "value_learning_rate": 1e-2,
        "max_grad_norm": 1e9,
    }
    return ppo_settings.PPOSettings(**{**small, **changed})


def options(**changed) -> UpdateOptions:
    """Return the options of an update, with some settings changed."""
    return update_options(config(**changed), SEED)


def sample_rollout(roles, prompts=PROMPTS, prompt_ids=range(4), step=1, *, recompute=False, n=None, **changed):
    """Return a rollout that the policy samples by itself, with some settings changed."""
    sampler = sampler_of(roles, config(**changed))
    return sampler.rollout(drawn(prompts, prompt_ids), step, recompute=recompute, samples_per_prompt=n)


def run_preflight(roles, step=0) -> bool:
    """Run the preflight of a float32 run."""
    return preflight(sampler_of(roles, config()), drawn(PROMPTS), dtype="float32", max_length=32, step=step)


def llama(auto, seed, **options):
    """Return a random Llama of VOCAB ids in eval mode."""
    return build(auto, seed, tiny_config(vocab_size=VOCAB, initializer_range=0.2, **options))


@pytest.fixture(params=["packed", "padded"])
def roles(request):
    """Return the models of a run; the tests below hold with packed and with padded rows."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = llama(AutoModelForCausalLM, 0)
    reward_model, value_model = (llama(AutoModelForSequenceClassification, s, num_labels=1) for s in (1, 2))
    reward_model.config.reward_bias, value_model.config.reward_bias = 0.3, 0.1
    packed = request.param == "packed"
    if packed:
        assert all([can_pack(model, 64) for model in (policy, reward_model, value_model)])
    return Roles(
        policy,
        copy.deepcopy(policy).requires_grad_(False),
        {"rm": reward_model},
        value_model,
        SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD),
        ACCELERATOR,
        packed=packed,
    )


def copied(roles, **changed):
    """Return the same roles with copies of policy and value model."""
    models = {"policy": copy.deepcopy(roles.policy), "value_model": copy.deepcopy(roles.value_model)}
    return replace(roles, **models | changed)


@pytest.fixture
def trainees(roles):
    return make_trainees(roles)


def make_trainees(roles, max_grad_norm=1e9):
    return [
        make_trainee(name, model, learning_rate=1e-2, max_grad_norm=max_grad_norm)
        for name, model in (("policy", roles.policy), ("value_model", roles.value_model))
    ]


@pytest.fixture
def rollout(roles):
    return sample_rollout(roles)


@pytest.fixture
def targets(rollout):
    """Return random advantages and returns, far from 0."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(rollout.values.shape, generator=generator) for _ in range(2)]


@pytest.fixture
def text_rows():
    return torch.randint(2, VOCAB, (4, 9), generator=torch.Generator().manual_seed(5)).tolist()


def ptx_figures(roles, trainee, text_rows, how) -> dict[str, float]:
    """Add the pretraining gradient to PPO's, and return what is read of it."""
    before = {"grad_norm/ppo": total_norm(gradients_of(trainee.parameters.values()))}
    ptx = ptx_gradient(roles, trainee, text_rows, how)
    return read(ptx.parts, before | {"grad_norm/ptx": ptx.norm}, [], ptx, 1.0)[0]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def at_last_token(model, ids):
    """Return the scalar head at the last token of an unpadded row.

    transformers' pooling would skip a sampled pad id."""
    return (model.model(ids).last_hidden_state[0, -1] @ model.score.weight[0]).item()


def clear(*models):
    for model in models:
        model.zero_grad(set_to_none=True)


def assert_close(one, other, **tolerance):
    assert set(one) == set(other) and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}")


class TestRollout:
    def test_has_the_numbers_of_plain_models_on_each_response(self, roles, rollout):
        """Log-probs, reference, values before each token, score at the last; no padding."""
        for b in range(8):
            n = len(rollout.responses[b])
            ids = torch.tensor([rollout.prompts[b] + rollout.responses[b]])
            with torch.no_grad():
                logp = roles.policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-n:, 0]
                torch.testing.assert_close(rollout.logprobs[b, :n], logp, rtol=1e-4, atol=1e-5)
                values = [at_last_token(roles.value_model, ids[:, : ids.shape[1] - n + t]) - 0.1 for t in range(n)]
                score = at_last_token(roles.reward_models["rm"], ids) - 0.3
            torch.testing.assert_close(rollout.values[b, :n], torch.tensor(values), rtol=1e-3, atol=1e-4)
            finished = ids[0, -1].item() == EOS
            assert rollout.finished[b].item() == finished
            assert rollout.scores[b].item() == pytest.approx(score if finished else -1.0, abs=1e-4)
        torch.testing.assert_close(
            rollout.ref_logprobs[rollout.mask], rollout.logprobs[rollout.mask], rtol=1e-4, atol=1e-5
        )

    def test_some_responses_end_and_some_do_not(self, rollout):
        """Otherwise the test above would not see both kinds."""
        assert 0 < rollout.finished.sum() < 8 and len(set(map(len, rollout.responses))) > 1

    def test_samples_of_one_prompt_differ(self, roles, rollout):
        rows = rollout.responses
        assert sum(rows[2 * i] != rows[2 * i + 1] for i in range(4)) >= 3

    def test_a_prompt_drawn_twice_in_one_batch_gets_two_samples(self, roles):
        """A batch may cross an epoch, or be larger than the number of prompts."""
        twice = sample_rollout(roles, [PROMPTS[0]] * 4, [7, 7, 7, 7], samples_per_prompt=1)
        assert len(set(map(tuple, twice.responses))) > 1

    def test_it_depends_on_run_update_and_prompt_and_not_on_the_order_in_the_batch(self, roles, rollout):
        """The same update, prompt and sample give the same response; another update another one."""

        def texts(prompts, ids, step):
            return sample_rollout(roles, prompts, ids, step).responses

        straight = texts(PROMPTS, range(4), 1)
        backwards = texts(PROMPTS[::-1], [3, 2, 1, 0], 1)
        assert [backwards[2 * (3 - i) + k] for i in range(4) for k in range(2)] == straight
        assert texts(PROMPTS, range(4), 2) != straight


class TestGradient:
    def test_at_the_first_minibatch_the_ratio_is_one(self, roles, rollout, targets):
        """Rollout and update use the same forward pass, so approxkl is 0 and nothing is clipped."""
        figures, _ = read_sums(ppo_gradients(roles, Batch(rollout, *targets), [6, 1, 3, 0], options()))
        assert figures["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert figures["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
        assert figures["policy/clipfrac_avg"] == 0 and figures["val/clipfrac_avg"] == 0

    def test_is_that_of_the_equations_over_single_rows(self, roles, rollout, targets):
        """Policy: −(1/N) Σ A_t log π at ratio 1. Value: ½(1/N) Σ (V − G)². With plain models."""
        mini = [6, 1, 3, 0]
        figures, _ = read_sums(ppo_gradients(roles, Batch(rollout, *targets), mini, options()))
        found = gradients(roles.policy), gradients(roles.value_model)
        clear(roles.policy, roles.value_model)
        advantages, returns = targets
        count = sum(len(rollout.responses[b]) for b in mini)
        surrogate = value_loss = 0.0
        for b in mini:
            n = len(rollout.responses[b])
            ids = torch.tensor([rollout.prompts[b] + rollout.responses[b]])
            logp = roles.policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-n:, 0]
            surrogate = surrogate - (advantages[b, :n] * logp).sum() / count
            hidden = roles.value_model.model(ids).last_hidden_state[0, -n - 1 : -1]
            values = hidden @ roles.value_model.score.weight[0] - 0.1
            value_loss = value_loss + 0.5 * ((values - returns[b, :n]) ** 2).sum() / count
        (surrogate + value_loss).backward()
        assert_close(found[0], gradients(roles.policy))
        assert_close(found[1], gradients(roles.value_model))
        assert figures["loss/value_avg"] == pytest.approx(value_loss.item(), rel=1e-4)

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_does_not_depend_on_the_micro_batch(self, roles, rollout, targets, size):
        """Also after the policy has moved away from the rollout's, where ratios are not 1."""
        with torch.no_grad():
            for p in roles.policy.parameters():
                p += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        results = []
        for micro in (8, size):
            clear(roles.policy, roles.value_model)
            how = options(per_device_train_batch_size=micro)
            figures, _ = read_sums(ppo_gradients(roles, Batch(rollout, *targets), list(range(8)), how))
            results.append((figures, gradients(roles.policy), gradients(roles.value_model)))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
        assert abs(results[0][0]["val/ratio"] - 1) > 1e-3
        assert_close(results[0][1], results[1][1])
        assert_close(results[0][2], results[1][2])

    @pytest.mark.parametrize("level", ["token", "sequence"])
    def test_with_weights_it_does_not_depend_on_the_micro_batch_either(self, roles, rollout, targets, level):
        """Each episode has the weights of its own tokens, wherever it is in a batch."""
        generator = torch.Generator().manual_seed(4)
        noise = 0.5 * torch.randn(rollout.logprobs.shape, generator=generator)
        rollout = replace(rollout, sampler_logprobs=torch.where(rollout.mask, rollout.logprobs + noise, math.nan))
        batch, figures = correct(Batch(rollout, *targets), Correction(level, 1.2, None, "truncate"))
        assert 0 < figures["sampling/importance_sampling_outliers"] < 1
        found = []
        for weighed, micro in ((batch, 8), (batch, 1), (batch, 3), (Batch(rollout, *targets), 8)):
            clear(roles.policy, roles.value_model)
            ppo_gradients(roles, weighed, list(range(8)), options(per_device_train_batch_size=micro))
            found.append((gradients(roles.policy), gradients(roles.value_model)))
        for policy, value in found[1:3]:
            assert_close(found[0][0], policy)
            assert_close(found[0][1], value)
        with pytest.raises(AssertionError):
            assert_close(found[0][0], found[3][0])
        assert_close(found[0][1], found[3][1])  # the value model learns from all samples alike

    def test_each_loss_has_a_gradient_in_its_own_model_only(self, roles, rollout, targets):
        """Two models, two optimizers, no vf_coef: with 0 advantages the policy's gradient is 0."""
        advantages, returns = targets
        ppo_gradients(roles, Batch(rollout, torch.zeros_like(advantages), returns), [0, 1, 2, 3], options())
        assert all((g == 0).all() for g in gradients(roles.policy).values())
        assert any((g != 0).any() for g in gradients(roles.value_model).values())
        assert not gradients(roles.reward_models["rm"]) and not gradients(roles.ref_policy)


class TestPtx:
    @pytest.fixture
    def alone(self, roles, rollout, targets):
        """Accumulate the PPO gradient of a minibatch in the policy; return a copy."""
        ppo_gradients(roles, Batch(rollout, *targets), [0, 1, 2, 3], options())
        return gradients(roles.policy)

    def language_model(self, roles, rows):
        """Return transformers' own causal loss of a copy of the policy, and its gradient."""
        model = copy.deepcopy(roles.policy)
        clear(model)
        ids = torch.tensor(rows)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), gradients(model)

    @pytest.mark.parametrize("micro", [1, 3, 8])
    def test_the_sum_is_the_ppo_gradient_plus_coef_times_the_language_models(
        self, roles, trainees, alone, text_rows, micro
    ):
        """InstructGPT's eq. 2: γ times the mean cross-entropy a token, at any micro-batch size."""
        how = options(ptx_coef=3.0, per_device_train_batch_size=micro)
        figures = ptx_figures(roles, trainees[0], text_rows, how)
        loss, ptx = self.language_model(roles, text_rows)
        assert_close(gradients(roles.policy), {n: alone[n] + 3.0 * ptx[n] for n in alone})
        assert figures["loss/ptx"] == pytest.approx(loss, rel=1e-5)
        one, other = (torch.cat([gs[n].flatten() for n in alone]) for gs in (alone, ptx))
        assert figures["grad_norm/ptx"] == pytest.approx(3.0 * other.norm().item(), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
        assert figures["grad_cosine"] == pytest.approx(cosine, rel=1e-3, abs=1e-5) and abs(cosine) > 1e-3

    def test_coefficient_zero_leaves_exactly_the_ppo_gradient(self, roles, trainees, alone, text_rows):
        figures = ptx_figures(roles, trainees[0], text_rows, options(ptx_coef=0.0))
        assert_close(gradients(roles.policy), alone, rtol=0, atol=0)
        assert figures["grad_norm/ptx"] == 0.0

    def test_it_does_not_touch_the_value_model(self, roles, trainees, alone, text_rows):
        before = gradients(roles.value_model)
        ptx_gradient(roles, trainees[0], text_rows, options())
        assert_close(gradients(roles.value_model), before, rtol=0, atol=0)


RATES = Rates(policy=1e-2, value=1e-2)
PLAIN = {"step": 1, "rates": RATES, "next_texts": None, "say": lambda line: None}  # an update without ptx


def learners_of(roles, max_grad_norm=1e9) -> Learners:
    """Return policy and value model with their optimizers, without an average."""
    return Learners(*make_trainees(roles, max_grad_norm), Average(None), Skips(0))


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class TestUpdate:
    def run(self, roles, rollout, targets, next_texts, max_grad_norm=1e9, value_rate=1e-2, stepped=None, **changed):
        """Update copies of the models.

        Args:
            roles, rollout, targets: Models, episodes, advantages and returns.
            next_texts: Gives the pretraining rows; None for plain PPO.
            max_grad_norm, value_rate: Of the optimizers.
            stepped: A list that gets the gradients with which the policy's optimizer steps.
            changed: Settings.

        Returns:
            Figures, the policy's weights, the value model's weights.
        """
        own = copied(roles)
        learners = learners_of(own, max_grad_norm)
        if stepped is not None:
            learners.policy.optimizer.register_step_pre_hook(lambda *_: stepped.append(gradients(own.policy)))
        keywords = PLAIN | {"rates": Rates(1e-2, value_rate), "next_texts": next_texts}
        figures = update(own, learners, Batch(rollout, *targets), options(**changed), **keywords)
        return figures, weights(own.policy), weights(own.value_model)

    def test_plain_ppo_and_ptx_of_weight_zero_are_the_same_update(self, roles, rollout, targets, text_rows):
        without = self.run(roles, rollout, targets, None, ptx_coef=0.0)
        zero = self.run(roles, rollout, targets, lambda n: text_rows[:n], ptx_coef=0.0)
        assert_close(without[1], zero[1], rtol=0, atol=0)
        assert_close(without[2], zero[2], rtol=0, atol=0)
        assert "loss/ptx" not in without[0] and zero[0]["loss/ptx"] > 0

    def test_ptx_changes_the_policy_and_not_the_value_model(self, roles, rollout, targets, text_rows):
        without = self.run(roles, rollout, targets, None)
        mixed = self.run(roles, rollout, targets, lambda n: text_rows[:n])
        assert any(not torch.equal(without[1][n], mixed[1][n]) for n in without[1])
        assert_close(without[2], mixed[2], rtol=0, atol=0)

    def test_one_minibatch_is_one_adamw_step_down_the_whole_gradient(self, roles, rollout, targets, text_rows):
        """Compare with torch's own AdamW on the gradient of PPO plus ptx, clipped to a norm of 0.5.

        One minibatch, three epochs, a learning rate for each model. A single step would be the same
        for any length of the gradient, any β and a weight decay of a few per cent."""
        apart = copied(roles)
        own = apart.policy, apart.value_model
        optimizers = [
            torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
            for model, rate in zip(own, (1e-2, 3e-3), strict=True)
        ]
        ids, norms = torch.tensor(text_rows), []
        for _ in range(3):
            ppo_gradients(apart, Batch(rollout, *targets), list(range(8)), options())
            (2.0 * own[0](input_ids=ids, labels=ids).loss).backward()  # adds to the gradient that is there
            for model, optimizer in zip(own, optimizers, strict=True):
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                clear(model)
        assert min(norms[:4]) > 0.5 > norms[5], "the limit acts, except in the last step of the value model"

        found = self.run(
            roles,
            rollout,
            targets,
            lambda n: text_rows,
            max_grad_norm=0.5,
            value_rate=3e-3,
            mini_batch_size=8,
            num_ppo_epochs=3,
        )
        assert_close(found[1], weights(own[0]), rtol=0, atol=2e-5)
        assert_close(found[2], weights(own[1]), rtol=0, atol=2e-5)

    def test_every_epoch_takes_one_step_a_minibatch_over_every_row_once(self, roles, rollout, targets, monkeypatch):
        """8 episodes, minibatches of 2, 3 epochs: 12 steps of each optimizer."""
        seen, taken = [], []
        true_gradients, true_step = ppo_update.ppo_gradients, ppo_update.clipped_step

        def note_gradients(roles, batch, index, how):
            seen.append(index)
            return true_gradients(roles, batch, index, how)

        def note_step(trainee, *rest):
            taken.append(trainee.name)
            return true_step(trainee, *rest)

        monkeypatch.setattr(ppo_update, "ppo_gradients", note_gradients)
        monkeypatch.setattr(ppo_update, "clipped_step", note_step)
        self.run(roles, rollout, targets, None, mini_batch_size=2, num_ppo_epochs=3)
        assert taken == ["policy", "value_model"] * 12
        epochs = [list(chain(*seen[4 * e : 4 * e + 4])) for e in range(3)]
        assert all(sorted(e) == list(range(8)) for e in epochs) and epochs[0] != epochs[1]

    def test_the_sum_of_both_gradients_is_clipped_and_the_norms_are_from_before(
        self, roles, rollout, targets, text_rows
    ):
        """Under a low limit the optimizer gets the sum, scaled down; grad_norm/* are unclipped."""
        limit, stepped = 1e-3, []
        figures, _, _ = self.run(roles, rollout, targets, lambda n: text_rows, mini_batch_size=8, stepped=stepped)
        clipped, _, _ = self.run(
            roles, rollout, targets, lambda n: text_rows, max_grad_norm=limit, mini_batch_size=8, stepped=stepped
        )
        whole, reached = stepped
        norm = torch.cat([g.flatten() for g in whole.values()]).norm().item()
        assert norm > 100 * limit
        assert_close(reached, {name: g * limit / norm for name, g in whole.items()}, rtol=1e-3, atol=1e-9)
        for name in ("grad_norm/ppo", "grad_norm/ptx", "grad_norm/value"):
            assert clipped[name] == figures[name] > 100 * limit

    def test_a_value_gradient_that_is_not_finite_leaves_the_policy_alone_too(self, roles, rollout, targets):
        """Both gradients are checked before either model moves: the message says "not taken"."""
        before = weights(roles.policy)
        returns = targets[1].clone()
        returns[0, 0] = torch.nan
        with pytest.raises(TrainingStopped, match="value_model"):
            update(roles, learners_of(roles), Batch(rollout, targets[0], returns), options(mini_batch_size=8), **PLAIN)
        assert_close(weights(roles.policy), before, rtol=0, atol=0)

    def test_a_skipped_step_moves_nothing_is_counted_and_is_logged_as_nan(self, roles, rollout, targets):
        """One of two minibatches has a NaN; with max_skipped_steps 1 the other one still steps.

        At the second NaN training stops, and the weights are finite."""
        lines, before = [], weights(roles.policy)
        bad = minibatches(options(), 1, 0)[0][0]
        advantages = targets[0].clone()
        advantages[bad, 0] = torch.nan
        skips, average = Skips(1), Average(0.5)
        learners = Learners(*make_trainees(roles), average, skips)
        average.start(learners.policy)
        batch, keywords = Batch(rollout, advantages, targets[1]), PLAIN | {"say": lines.append}
        figures = update(roles, learners, batch, options(), **keywords)
        assert math.isnan(figures["loss/policy_avg"]) and skips.count == 1
        (line,) = lines
        assert "policy: the gradient at step 1 is nan: step skipped (1 of at most 1)" in line
        moved = weights(roles.policy)
        assert any(not torch.equal(moved[n], before[n]) for n in moved)
        assert all(x.isfinite().all() for x in moved.values())
        halfway = {n: (before[n] + moved[n]) / 2 for n in moved}  # one step was taken, so the average took one
        assert_close(average.tensors, halfway, rtol=1e-6, atol=1e-7)
        with pytest.raises(TrainingStopped, match="max_skipped_steps 1"):
            update(roles, learners, batch, options(), **keywords)
        assert all(x.isfinite().all() for x in weights(roles.policy).values())

    @pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "scores"])
    def test_episodes_that_are_not_finite_are_named(self, rollout, targets, name):
        assert not_finite_episodes(rollout, targets[0], 4) is None
        x = getattr(rollout, name).clone()
        x.view(8, -1)[5, 0] = torch.inf
        line = not_finite_episodes(replace(rollout, **{name: x}), targets[0] * torch.nan, 4)
        assert line == f"update 4: {name} not finite on prompts 2"

    def test_the_samples_of_a_prompt_stay_in_one_minibatch_where_they_fit(self):
        """8 episodes, 2 a prompt: minibatches of 4 hold whole prompts, minibatches of 1 cannot."""
        together = minibatches(options(), 1, 0)
        assert sorted(chain(*together)) == list(range(8))
        assert all(sorted(mini)[::2] == [i - 1 for i in sorted(mini)[1::2]] for mini in together)
        assert all(i % 2 == 0 for mini in together for i in sorted(mini)[::2])
        apart = minibatches(options(mini_batch_size=1), 1, 0)
        assert sorted(chain(*apart)) == list(range(8)) and len(apart) == 8
        assert minibatches(options(), 1, 1) != together

    def test_it_raises_the_probability_of_what_was_better_than_expected(self, roles):
        """A bandit of one prompt with reward 1 for one token: five updates make it likelier."""
        changed, arm = {"response_length": 1, "samples_per_prompt": 8, "mini_batch_size": 8}, 6
        learners = learners_of(roles)
        probability = lambda: roles.policy(torch.tensor([[7]])).logits[0, -1].softmax(-1)[arm].item()  # noqa: E731
        with torch.no_grad():
            roles.policy.lm_head.weight *= 0.1  # a nearly even start
        start = probability()
        for step in range(1, 6):
            rollout = sample_rollout(roles, [[7]], [0], step, n=8, **changed)
            forced = [[arm]] * 2 + rollout.responses[2:]  # so that the arm is tried in every batch
            with torch.no_grad():
                old = response_logprobs(roles.policy, make_rows([[7]] * 8, forced, PAD))
            rollout = replace(rollout, responses=forced, logprobs=old, ref_logprobs=old, values=torch.zeros(8, 1))
            reward = (torch.tensor(forced) == arm).float()
            batch = Batch(rollout, reward - reward.mean(), reward)
            update(roles, learners, batch, options(**changed), **PLAIN | {"step": step})
        assert probability() > 2 * start


class Engine:
    """Sample without the policy, with log-probabilities that are all `logprob`."""

    is_policy = False

    def __init__(self, logprob=0.0):
        self.logprob, self.updates, self.is_closed = logprob, [], False

    def start(self, model, poll):
        pass

    def update_weights(self, model):
        self.updates.append(model)

    def sample(self, request, poll):
        responses = [[2 + seed % 7, 3 + seed % 5, EOS][: 1 + seed % 3] for seed in request.seeds]
        shape = (len(responses), 3)
        return Sampled(responses, torch.full(shape, self.logprob), torch.zeros(shape))

    def close(self):
        self.is_closed = True


class TestEngine:
    def sampler(self, roles, engine, **rules):
        """Return a sampler with an engine; rules: settings of ppo.rollout."""
        return sampler_of(roles, config(rollout=RolloutSettings(**rules)), engine)

    def test_log_probs_are_the_policys_and_the_kl_is_recorded(self, roles):
        sampler = self.sampler(roles, Engine(-2.0), max_engine_kl=99.0)
        rollout = sampler.rollout(drawn(PROMPTS), 1, recompute=False)
        with torch.no_grad():
            rows = rollout.rows(range(8), PAD, roles.packed)
            torch.testing.assert_close(rollout.logprobs, response_logprobs(roles.policy, rows))
        ratio = [math.exp(p + 2.0) for p in rollout.logprobs[rollout.mask].tolist()]
        expected = sum(r - 1 - math.log(r) for r in ratio) / len(ratio)
        assert rollout.engine_kl == pytest.approx(expected, rel=1e-4)
        assert (rollout.sampler_logprobs == -2.0).all()

    def test_its_samples_are_weighed_and_the_policys_own_have_weight_one(self, roles):
        sampler = self.sampler(roles, Engine(-2.0), max_engine_kl=99.0)
        how = Correction("token", 3.0, None, "truncate")
        for of_engine in (True, False):
            rollout = sampler.rollout(drawn(PROMPTS), 1, recompute=False) if of_engine else sample_rollout(roles)
            batch = Batch(rollout, rollout.values, rollout.values)
            assert correct(batch, None) == (batch, {})
            weights = correct(batch, how)[0].weights[rollout.mask]
            right = (rollout.logprobs + 2.0).exp().clamp(max=3.0)[rollout.mask]
            torch.testing.assert_close(weights, right if of_engine else torch.ones_like(weights))

    def test_it_gets_the_weights_once_after_each_change(self, roles):
        engine = Engine(-2.0)
        sampler = self.sampler(roles, engine, max_engine_kl=99.0)
        sampler.rollout(drawn(PROMPTS), 1, recompute=False)
        assert engine.updates == []  # it has started with them
        sampler.weights_changed = True
        for step in (2, 3):
            sampler.rollout(drawn(PROMPTS), step, recompute=False)
            assert engine.updates == [roles.policy]

    @pytest.mark.parametrize("logprob", [-20.0, math.nan, math.inf])
    def test_another_distribution_ends_it(self, roles, logprob):
        engine = Engine(logprob)
        sampler = self.sampler(roles, engine)
        with pytest.raises(EngineLost, match="update 1: the engine vllm does not sample from the policy"):
            sampler.rollout(drawn(PROMPTS), 1, recompute=False)
        assert engine.is_closed and sampler.is_lost

    def test_or_the_policy_goes_on_by_itself(self, roles):
        engine = Engine(-20.0)
        sampler = self.sampler(roles, engine, on_failure="transformers")
        rollout = sampler.rollout(drawn(PROMPTS), 1, recompute=False)
        assert rollout.responses == sample_rollout(roles).responses and engine.is_closed
        assert sampler.rollout(drawn(PROMPTS), 2, recompute=False).responses

    def test_a_policy_that_is_not_finite_is_not_its_fault(self, roles):
        engine = Engine()
        sampler = self.sampler(roles, engine)
        with torch.no_grad():
            roles.policy.lm_head.weight.fill_(math.nan)
        rollout = sampler.rollout(drawn(PROMPTS), 1, recompute=False)
        assert not engine.is_closed and math.isnan(rollout.engine_kl)
        assert "logprobs not finite" in not_finite_episodes(rollout, rollout.values, 1)


class TestPreflight:
    def test_passes_where_policy_and_reference_are_one_model(self, roles):
        run_preflight(roles)

    def test_a_sampler_that_is_slightly_off_has_its_log_probs_recomputed(self, roles, monkeypatch):
        """Within ten times the limit: log-probs and entropies are then the model's own."""
        right = transformers.sample_with_logprobs

        def off(*args, **options):
            found = right(*args, **options)
            return replace(found, logprobs=found.logprobs + 5e-4, entropy=found.entropy + 1.0)

        monkeypatch.setattr(transformers, "sample_with_logprobs", off)
        assert run_preflight(roles) is True
        again = sample_rollout(roles, recompute=True)
        rows = again.rows(range(8), PAD, roles.packed)
        with torch.no_grad():
            logprobs, entropy = response_logprobs(roles.policy, rows, with_entropy=True)
        torch.testing.assert_close(again.logprobs, logprobs)
        torch.testing.assert_close(again.entropy, entropy)

    def test_after_the_start_policy_and_reference_may_differ(self, roles):
        with torch.no_grad():
            roles.ref_policy.lm_head.weight += 0.05 * torch.randn_like(roles.ref_policy.lm_head.weight)
        assert run_preflight(roles, step=3) is False

    def test_refuses_another_reference(self, roles):
        with torch.no_grad():
            roles.ref_policy.lm_head.weight += 0.05 * torch.randn_like(roles.ref_policy.lm_head.weight)
        with pytest.raises(UserError, match="KL to the reference"):
            run_preflight(roles)

    def test_refuses_log_probs_that_depend_on_the_batch(self, roles):
        """Dropout left on is the usual cause."""
        noise = torch.Generator().manual_seed(0)
        roles.policy.model.norm.register_forward_hook(
            lambda module, args, out: out + 0.05 * torch.randn(out.shape, generator=noise)
        )
        with pytest.raises(UserError, match="preflight"):
            run_preflight(roles)

    def test_refuses_noise_that_only_training_mode_has(self, roles):
        """The update runs in it; the rollout does not."""
        noise = torch.Generator().manual_seed(0)
        roles.policy.model.norm.register_forward_hook(
            lambda module, args, out: out + 0.05 * torch.randn(out.shape, generator=noise) * module.training
        )
        with pytest.raises(UserError, match="preflight"):
            run_preflight(roles)


def test_the_reference_of_an_adapted_policy_is_the_policy_without_its_adapter(roles, rollout):
    """There is no second model in memory, and the adapter is on again afterwards."""
    from stages.models.adapters import AdapterSettings, trainable_parameters, with_adapter

    rows = rollout.rows(range(8), PAD, roles.packed)
    base = response_logprobs(roles.policy, rows).detach()
    policy = with_adapter(copy.deepcopy(roles.policy), AdapterSettings(method="lora", r=4, lora_alpha=8))
    with torch.no_grad():
        for p in trainable_parameters(policy).values():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    adapted = replace(roles, policy=policy, ref_policy=None)
    before = response_logprobs(policy, rows).detach()
    torch.testing.assert_close(reference_logprobs(adapted, rows, 1.0), base, rtol=0, atol=0)
    torch.testing.assert_close(response_logprobs(policy, rows), before, rtol=0, atol=0)
    assert not torch.allclose(before, base, atol=1e-3)


def test_episodes_may_be_sampled_a_few_at_a_time(roles, rollout):
    few = sample_rollout(roles, local_rollout_forward_batch_size=3)
    assert few.responses == rollout.responses
    torch.testing.assert_close(few.logprobs, rollout.logprobs)


def test_figures_of_a_rollout_by_hand(rollout):
    """KL is a sum over a response, entropy and lengths are means, perfect values explain all."""
    mask = rollout.mask
    moved = replace(rollout, ref_logprobs=rollout.logprobs - 0.25)
    figures = describe(moved, rollout.values, kl_coef=0.5, kl_estimator="k1")
    lengths = [int(m.sum()) for m in mask]
    assert figures["objective/length"] == pytest.approx(sum(lengths) / 8)
    assert figures["objective/kl"] == pytest.approx(0.25 * sum(lengths) / 8, rel=1e-5)
    assert figures["objective/rlhf_reward"] == pytest.approx(
        rollout.scores.mean().item() - 0.5 * 0.25 * sum(lengths) / 8, rel=1e-5
    )
    entropies = [e for row, m in zip(rollout.entropy, mask, strict=True) for e in row[m].tolist()]
    assert figures["objective/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert figures["objective/eos_rate"] == pytest.approx(rollout.finished.float().mean().item())
    assert figures["val/explained_variance"] == pytest.approx(1.0)
