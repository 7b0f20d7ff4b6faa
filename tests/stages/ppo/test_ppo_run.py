"""Compare a whole run of PPO with a second computation by plain transformers, episode by episode.

Only random draws are taken from the run: the responses, the minibatches and the pretraining rows of
each step. Scores, KL, rewards, advantages, both gradients, the joint clipping, the optimizer steps
and every figure are computed again.
"""

import copy
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import second_route as plain
import torch
from micro_chain import spy

from stages.ppo import sampling, update

SMALL = {
    "batch_size": 8,
    "mini_batch_size": 8,
    "per_device_train_batch_size": 3,
    "samples_per_prompt": 2,
    "response_length": 6,
    "max_length": 40,
    "eval_prompts": 3,
    "ptx_length": 16,
}
# All terms of eq. 2 at a temperature that is not 1. Half of the training text is in every ptx
# batch.
PTX = SMALL | {
    "total_episodes": 16,
    "num_ppo_epochs": 2,
    "temperature": 0.7,
    "learning_rate": 3e-3,
    "value_learning_rate": 1e-2,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "kl_coef": 0.2,
    "cliprange": 0.05,
    "cliprange_value": 0.1,
    "gamma": 0.95,
    "lam": 0.8,
    "ptx_coef": 0.5,
    "ptx_ratio": 0.625,
    "publish_ema": True,
    "ema_decay": 0.7,
    "eval_steps": 1,
}
# The other choices: ppo_init/, two reward models and a third held-out one, k3, steering, the best
# policy.
CHOICES = SMALL | {
    "total_episodes": 32,
    "mini_batch_size": 4,
    "learning_rate": 8e-3,
    "value_learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "max_grad_norm": 5.0,
    "kl_coef": 0.1,
    "kl_estimator": "k3",
    "kl_target": 0.5,
    "kl_horizon": 40,
    "ptx_coef": 0.0,
    "missing_eos_score": None,
    "score_clip": 0.6,
    "length_penalty": 0.05,
    "whiten_rewards": True,
    "whiten_advantages": False,
    "reward_ensemble": "min",
    "keep": "best",
    "eval_steps": 1,
}


COMBINED = {"mean": torch.mean, "min": torch.amin}


@dataclass
class Run:
    """A finished run, what it sampled, and its settings."""

    finished: object
    settings: SimpleNamespace
    batches: dict[int, list]  # update → (prompt, response) ids of its episodes
    evaluations: dict[int, list]  # update → the same of the held-out samples after it
    minibatches: dict[int, list]  # update → index lists, an epoch after the other
    texts: list[list]  # the pretraining rows of every optimizer step


@dataclass
class Expected:
    """The second route's results: models after the last update, figures of each update."""

    route: object
    rows: list[dict] = field(default_factory=list)  # of metrics.jsonl
    evaluations: list[dict] = field(default_factory=list)  # of evaluations.jsonl, from before the first update
    policies: list = field(default_factory=list)  # at each evaluation


def run_ppo(chain, folder, monkeypatch, choices, *more, inputs=None) -> Run:
    """Run PPO, and record its calls."""
    more += ("evaluate.policies=[sft]",)  # otherwise evaluate's settings would have to agree with PPO's
    collected = spy(monkeypatch, sampling, "collect")
    divided, added = (spy(monkeypatch, update, name) for name in ("minibatches", "ptx_gradient"))
    settings = [f"ppo.{key}={json.dumps(value)}" for key, value in choices.items()]
    finished = chain.run("ppo", folder, *settings, *more, inputs=inputs)
    batches, evaluations, divisions = {}, {}, {}
    for call in collected:
        _, stream, step = call.kwargs["seed"]
        episodes = list(zip(call.result.prompts, call.result.responses, strict=True))
        if stream == "rollout":
            batches[step] = episodes
        elif stream == "held-out":
            evaluations[len(evaluations)] = episodes
    for call in divided:
        divisions.setdefault(call.args[1], []).extend(call.result)
    settings = chain.experiment(*settings, *more).ppo
    return Run(finished, settings, batches, evaluations, divisions, [call.args[2] for call in added])


@dataclass
class SecondRoute:
    """PPO-ptx in its plainest form: settings, models and the pretraining rows of each step.

    The rewards of each episode are a tensor (R,); tokens of different episodes meet only in
    whitening.
    """

    settings: object
    eos: int
    policy: object
    reference: object
    value: object
    scorers: list
    texts: list
    judge: object = None
    kl_coef: float = 0.0
    average: list = field(default_factory=list)

    def __post_init__(self):
        self.kl_coef = self.settings.kl_coef
        self.average = [p.detach().clone() for p in self.policy.parameters()]
        self.optimizer = plain.AdamW(self.policy, self.settings.max_grad_norm)
        self.value_optimizer = plain.AdamW(self.value, self.settings.max_grad_norm)

    def final_score(self, scores: list, response: list[int]) -> float:
        """Return the score of an episode under the settings' rules."""
        c, score = self.settings, float(COMBINED[self.settings.reward_ensemble](torch.stack(scores)))
        if c.score_clip is not None:
            score = max(-c.score_clip, min(c.score_clip, score))
        if c.missing_eos_score is not None and response[-1] != self.eos:
            score = c.missing_eos_score
        return score - c.length_penalty * len(response)

    @torch.no_grad()
    def run_models(self, episodes: list) -> SimpleNamespace:
        """Run every model over each episode, before anything is updated."""
        outputs = SimpleNamespace(logps=[], ref_logps=[], values=[], scores=[], judged=[], entropies=[])
        for prompt, response in episodes:
            T = self.settings.temperature
            outputs.logps.append(plain.token_logps(self.policy, prompt, response, T))
            outputs.ref_logps.append(plain.token_logps(self.reference, prompt, response, T))
            outputs.values.append(plain.values(self.value, prompt, response))
            outputs.scores.append(self.final_score([plain.score(m, prompt, response) for m in self.scorers], response))
            spread = plain.distributions(self.policy, prompt, response, T)
            outputs.entropies.append(-(spread.exp() * spread).sum(-1))
            if self.judge is not None:
                outputs.judged.append(self.final_score([plain.score(self.judge, prompt, response)], response))
        gaps = [a - b for a, b in zip(outputs.logps, outputs.ref_logps, strict=True)]
        outputs.k1, outputs.k3 = gaps, [torch.exp(-d) - 1 + d for d in gaps]
        return outputs

    def figures(self, outputs: SimpleNamespace, episodes: list, kl_coef: float) -> dict[str, float]:
        """Return the figures of the episodes, under their names after `objective/`."""

        def mean(numbers) -> float:
            return sum(map(float, numbers)) / len(episodes)

        kls = {"k1": mean(x.sum() for x in outputs.k1), "k3": mean(x.sum() for x in outputs.k3)}
        return {
            "kl": kls["k1"],
            "kl_k3": kls["k3"],
            "entropy": float(torch.cat(outputs.entropies).mean()),
            "scores": mean(outputs.scores),
            "rlhf_reward": mean(outputs.scores) - kl_coef * kls[self.settings.kl_estimator],
            "length": mean(len(r) for _, r in episodes),
            "eos_rate": mean(r[-1] == self.eos for _, r in episodes),
        }

    def advantages(self, outputs: SimpleNamespace) -> tuple[list, list]:
        """Return advantages and returns, (R,) for each episode, by the sum that defines GAE."""
        c = self.settings
        kls = outputs.k1 if c.kl_estimator == "k1" else outputs.k3
        rewards = [-self.kl_coef * kl for kl in kls]
        for reward, score in zip(rewards, outputs.scores, strict=True):
            reward[-1] += score
        if c.whiten_rewards:
            every = torch.cat(rewards)
            scale = (every.var(unbiased=False) + 1e-8).sqrt()
            rewards = [(r - every.mean()) / scale + every.mean() for r in rewards]
        advantages = []
        for reward, V in zip(rewards, outputs.values, strict=True):
            delta = reward + c.gamma * torch.cat([V[1:], torch.zeros(1)]) - V
            ahead = [sum((c.gamma * c.lam) ** (k - t) * delta[k] for k in range(t, len(V))) for t in range(len(V))]
            advantages.append(torch.stack(ahead))
        returns = [a + v for a, v in zip(advantages, outputs.values, strict=True)]
        if c.whiten_advantages:
            every = torch.cat(advantages)
            advantages = [(a - every.mean()) / (every.var(unbiased=False) + 1e-8).sqrt() for a in advantages]
        return advantages, returns

    def update(self, episodes: list, minibatches: list[list[int]], rate: float, value_rate: float) -> dict:
        """Take one update; return its row of metrics.jsonl without eps and lr."""
        c, outputs = self.settings, self.run_models(episodes)
        advantages, returns = self.advantages(outputs)
        G, V = torch.cat(returns), torch.cat(outputs.values)
        row = {f"objective/{key}": x for key, x in self.figures(outputs, episodes, self.kl_coef).items()}
        row |= {"val/explained_variance": float(1 - (G - V).var(unbiased=False) / G.var(unbiased=False))}
        row |= {"kl_coef": self.kl_coef}
        steps = []
        for mini in minibatches:
            steps.append(self.step([episodes[i] for i in mini], *(
                [xs[i] for i in mini] for xs in (outputs.logps, outputs.values, advantages, returns)
            ), rate, value_rate))  # fmt: skip
        row |= {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        if c.kl_target is not None:
            error = max(-0.2, min(0.2, row["objective/kl"] / c.kl_target - 1))
            self.kl_coef *= 1 + error * len(episodes) / c.kl_horizon
        return row

    def step(self, episodes, old_logps, old_values, advantages, returns, rate: float, value_rate: float) -> dict:
        """Take one step of each optimizer on a minibatch."""
        c, N = self.settings, sum(len(r) for _, r in episodes)
        new = [plain.token_logps(self.policy, *episode, c.temperature) for episode in episodes]
        ratio = torch.cat([a - b for a, b in zip(new, old_logps, strict=True)]).exp()
        A, clipped = torch.cat(advantages), ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
        loss = -torch.minimum(ratio * A, clipped * A).sum() / N
        gradients = plain.gradients_of(loss, self.policy)
        figures = {
            "loss/policy_avg": loss.item(),
            "val/ratio": ratio.mean().item(),
            "policy/clipfrac_avg": (ratio * A > clipped * A).float().mean().item(),
            "policy/approxkl_avg": 0.5 * ratio.log().square().mean().item(),
            "grad_norm/ppo": plain.norm_of(gradients),
        }
        if self.texts:
            ids = torch.tensor(self.texts[self.optimizer.steps])
            text = self.policy(input_ids=ids, labels=ids).loss
            more = [c.ptx_coef * g for g in plain.gradients_of(text, self.policy)]
            both = [torch.cat([g.flatten() for g in gs]) for gs in (gradients, more)]
            cosine = torch.nn.functional.cosine_similarity(*both, dim=0).item()
            figures |= {"loss/ptx": text.item(), "grad_norm/ptx": plain.norm_of(more), "grad_cosine": cosine}
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
        V = torch.cat([plain.values(self.value, *episode) for episode in episodes])
        old, G = torch.cat(old_values), torch.cat(returns)
        near = old + (V - old).clamp(-c.cliprange_value, c.cliprange_value)
        value_loss = 0.5 * torch.maximum((V - G) ** 2, (near - G) ** 2).sum() / N
        figures |= {
            "loss/value_avg": value_loss.item(),
            "val/clipfrac_avg": ((near - G) ** 2 > (V - G) ** 2).float().mean().item(),
        }
        value_gradients = plain.gradients_of(value_loss, self.value)
        self.optimizer.step(gradients, rate)
        figures["grad_norm/value"] = self.value_optimizer.step(value_gradients, value_rate)
        for held, p in zip(self.average, self.policy.parameters(), strict=True):
            held.copy_(c.ema_decay * held + (1 - c.ema_decay) * p.detach())
        return figures


def second_route(chain, run: Run, start="sft/model", judge=None) -> SecondRoute:
    """Return PPO before its first update, from the folders that the run started with."""
    return SecondRoute(
        run.settings,
        chain.tokenizer.eos_token_id,
        plain.language_model(chain.root / start),
        plain.language_model(chain.root / start),
        plain.scalar_model(chain.root / "rm/model"),
        [plain.scalar_model(chain.root / folder) for folder in ("rm/model", "rm/ensemble/1")],
        run.texts,
        judge and plain.scalar_model(chain.root / judge),
    )


def held_out_row(route: SecondRoute, episodes: list) -> dict[str, float]:
    """Return a row of evaluations.jsonl."""
    outputs = route.run_models(episodes)
    row = route.figures(outputs, episodes, route.settings.kl_coef)
    row["score"] = row.pop("scores")
    del row["kl_k3"]
    return row | ({"held_out_score": sum(outputs.judged) / len(episodes)} if route.judge is not None else {})


def close(expected: dict, **tolerance) -> dict:
    return {key: pytest.approx(x, **(tolerance or {"rel": 2e-4, "abs": 2e-5})) for key, x in expected.items()}


def second_run(route: SecondRoute, run: Run, shares: list[float]) -> Expected:
    """Take every update by the second route; `shares`: of the peak rates, one for each update."""
    c, expected = route.settings, Expected(route)
    for step, share in enumerate([0.0, *shares]):
        if step:
            rates = share * c.learning_rate, share * c.value_learning_rate
            row = route.update(run.batches[step], run.minibatches[step], *rates)
            expected.rows.append(row | {"lr": rates[0], "episode": step * c.batch_size})
        expected.evaluations.append(held_out_row(route, run.evaluations[step]))
        expected.policies.append(copy.deepcopy(route.policy))
    return expected


@pytest.fixture(scope="module")
def ptx(chain, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        run = run_ppo(chain, tmp_path_factory.mktemp("ptx") / "ppo", patch, PTX)
    return run, second_run(second_route(chain, run), run, [0.1, 0.55])  # the warm-up, from a tenth


@pytest.fixture(scope="module")
def choices(chain, tmp_path_factory):
    more = [f"ppo.held_out_reward_model={chain.root}/other_rm/model", "sft.ppo_init={num_train_epochs: 1}", "seed=8"]
    with pytest.MonkeyPatch.context() as patch:
        run = run_ppo(chain, tmp_path_factory.mktemp("choices") / "ppo", patch, CHOICES, *more)
    folders = {"start": "sft/ppo_init", "judge": "other_rm/model"}
    return run, second_run(second_route(chain, run, **folders), run, [0.1, 1, 2 / 3, 1 / 3])


@pytest.fixture(params=["ptx", "choices"])
def case(request):
    """Return a run and its second computation: the tests below hold for any run."""
    return request.getfixturevalue(request.param)


class TestAnyRun:
    def test_the_value_model_stepped_at_its_own_rate(self, case):
        run, expected = case
        published = plain.scalar_model(run.finished.folder / "value_model")
        assert plain.largest_difference(published, expected.route.value) < 1e-5

    def test_every_figure_of_every_update(self, case):
        run, expected = case
        rows = run.finished.rows("metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 1 + len(expected.rows)))
        for row, figures in zip(rows, expected.rows, strict=True):
            assert {key: row[key] for key in figures} == close(figures)
            assert set(row) - set(figures) == {"step", "eps", "val/engine_kl"}
            assert row["val/engine_kl"] == 0 and row["eps"] > 0

    def test_the_held_out_figures_after_every_update(self, case):
        run, expected = case
        rows = run.finished.rows("evaluations.jsonl")
        assert [row.pop("step") for row in rows] == list(range(1 + len(expected.rows)))
        for row, figures in zip(rows, expected.evaluations, strict=True):
            assert row == close(figures)

    def test_the_manifests_figures_are_of_the_published_policy_and_of_sft(self, case):
        run, expected = case
        figures, before = run.finished.figures, expected.evaluations[0]
        published = expected.evaluations[figures["best_step"] if run.settings.keep == "best" else -1]
        assert {key: figures[key] for key in published} == close(published)
        assert {key: figures[f"{key}_before"] for key in before} == close(before)
        assert figures["updates"] == len(expected.rows) and abs(figures["kl_before"]) < 1e-5 < abs(figures["kl"])

    def test_no_prompt_is_both_trained_on_and_held_out(self, case, chain):
        """The fifth with the lowest hashes is held out; an epoch has each other prompt once."""
        run, expected = case
        prompts = [row["prompt"] for row in chain.rows("prompts.jsonl")]
        ids = lambda some: sorted(plain.prompt_ids(chain.tokenizer, p) for p in some)  # noqa: E731
        ordered = sorted(prompts, key=plain.prompt_hash_fraction)
        assert all(sorted(p for p, _ in episodes) == ids(ordered[:3]) for episodes in run.evaluations.values())
        episodes = [p for step in range(1, 1 + len(expected.rows)) for p, _ in run.batches[step]]
        drawn, trained_on = episodes[::2], ids(ordered[3:])
        assert drawn == episodes[1::2], "the two samples of a prompt are next to each other"
        epoch = drawn[: len(trained_on)]
        assert all(p in trained_on for p in drawn) and all(epoch.count(p) == 1 for p in epoch)

    def test_the_samples_that_a_person_sees_are_what_was_judged(self, case, chain):
        run, expected = case
        last = [row for row in run.finished.rows("samples.jsonl") if row["step"] == len(expected.rows)]
        episodes = [
            (plain.prompt_ids(chain.tokenizer, row["prompt"]), response)
            for row in last
            for prompt, response in run.evaluations[row["step"]]
            if chain.tokenizer.decode(response, skip_special_tokens=True).strip() == row["response"]
        ]
        assert len(episodes) == len(last) == 3 and all(
            episode in run.evaluations[last[0]["step"]] for episode in episodes
        )
        outputs = expected.route.run_models(episodes)
        assert [row["score"] for row in last] == pytest.approx(outputs.scores, abs=1e-4)
        assert [row["kl"] for row in last] == pytest.approx([float(x.sum()) for x in outputs.k1], abs=1e-4)


def test_eq_2_at_another_temperature(ptx):
    """Log-probs are at 0.7, and both gradients are clipped as one: the same policy results."""
    run, expected = ptx
    assert plain.largest_difference(plain.language_model(run.finished.folder / "model"), expected.route.policy) < 1e-5


def test_ptx_reads_the_training_part_of_the_corpus_evenly(ptx, chain):
    """The training documents make ten rows; five a step, so all of them every two steps."""
    texts = [row["text"] for row in chain.rows("documents.jsonl")]
    rows = plain.packed_rows(chain.tokenizer, [text for text in texts if plain.hash_fraction(text) >= 0.3], 16)
    steps = ptx[0].texts
    assert len(rows) == 10 and [len(step) for step in steps] == [5] * 4
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == sorted(rows)


def test_that_run_comes_to_where_each_rule_has_something_to_say(ptx):
    """Otherwise the comparisons would also hold without clipping, EOS or a gradient limit."""
    first, last = ptx[1].rows
    assert last["policy/clipfrac_avg"] > 0 and last["val/clipfrac_avg"] > 0 and abs(last["objective/kl"]) > 1e-3
    assert 0 < first["objective/eos_rate"] < 1 and last["grad_norm/ptx"] > PTX["max_grad_norm"]
    assert last["grad_norm/ppo"] > 0.1 and abs(last["grad_cosine"]) < 0.9


def test_the_published_average_is_of_every_optimizer_step(ptx):
    run, expected = ptx
    averaged = plain.language_model(run.finished.folder / "model_ema")
    for p, held in zip(averaged.parameters(), expected.route.average, strict=True):
        torch.testing.assert_close(p.detach(), held, rtol=0, atol=1e-5)


def test_the_best_policy_is_published_if_requested(choices):
    """By the held-out reward model's score minus kl_coef times KL.

    It is not the last policy, nor the one that this score or the climbed reward would choose by
    itself."""
    run, expected = choices
    worth = [row["held_out_score"] - row["score"] + row["rlhf_reward"] for row in expected.evaluations]
    best, by_score, climbed = (
        max(range(len(xs)), key=xs.__getitem__)
        for xs in (worth, *([row[key] for row in expected.evaluations] for key in ("held_out_score", "rlhf_reward")))
    )
    assert best not in (0, by_score, climbed, len(worth) - 1), "they agree; take another seed"
    assert run.finished.figures["best_step"] == best
    published = plain.language_model(run.finished.folder / "model")
    assert plain.largest_difference(published, expected.policies[best]) < 1e-5
