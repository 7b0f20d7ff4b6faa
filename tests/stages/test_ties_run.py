"""Test reward models and DPO on rankings with many ties against a second computation.

The second route uses transformers only, one response at a time, and worths in place of their
logarithms. It takes from the run the first weights, the first tie strengths, and which prompts each
batch holds.
"""

import itertools
import json
import math
from collections import Counter

import pytest
import second_route as plain
import torch
from micro_chain import watch_fit, write_rows
from scipy.optimize import minimize
from torch import nn

from data.group_rows import count_ties, has_pair, most_tied
from data.groups import PromptGroup
from pipeline.errors import UserError
from stages import dpo, rm
from stages.settings.dpo import DPOSettings
from stages.shared.inputs import LengthLimit, load_groups
from stages.training.ties import NAME, count_choices, strengths_at_equal_scores, tie_model

STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_length": 48,
    "lr_scheduler_type": "constant",
    "eval_steps": 4,
    "weight_decay": 0.5,
    "max_grad_norm": 0.4,
    "tie_learning_rate": 0.05,
}
RM = STEPS | {"learning_rate": 5e-3, "bias_demonstrations": 10, "per_device_train_tokens": 90}
DPO = STEPS | {"learning_rate": 5e-3, "beta": 0.3, "sample_tokens": 0}


@pytest.fixture(scope="module")
def rankings(chain, tmp_path_factory):
    """Return the chain's rankings with coarse ranks; a fourth of the prompts have ties only."""
    folder = tmp_path_factory.mktemp("coarse") / "rankings"
    for name in ("train.jsonl", "validation.jsonl"):
        rows = chain.rows(f"rankings/{name}")
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        for row in rows:
            top = 1 if prompts.index(row["prompt"]) % 4 == 2 else 2
            row["ranks"] = [rank and min(rank, top) for rank in row["ranks"]]
        write_rows(folder / name, rows)
    return folder


def groups_of(chain, rankings, name):
    """Return the second route's groups of a file that have two different judged responses."""
    rows = [json.loads(line) for line in (rankings / name).read_text(encoding="utf-8").splitlines()]
    groups = plain.groups_of(chain.tokenizer, rows)
    return [g for g in groups if any(len(judged(g, who)) > 1 for who in range(len(g.ranks)))]


def judged(group, who):
    """Return {response: rank} of a labeler; of equal responses the first with the best rank."""
    best = {}
    for i, rank in enumerate(group.ranks[who]):
        if rank is not None:
            key = tuple(group.responses[i])
            best[key] = min(best.get(key, (rank, i)), (rank, i))
    return {i: rank for rank, i in best.values()}


def davidson(group, utilities, strengths):
    """Return the loss of a group, and (ties, expected ties) among its pairs."""
    total, ties, expected = torch.zeros(()), [], []
    for ranks in group.ranks:
        seen = [i for i, rank in enumerate(ranks) if rank is not None]
        for i, j in itertools.combinations(seen, 2):
            if group.responses[i] != group.responses[j]:
                a, b = utilities[i].exp(), utilities[j].exp()
                tie = strengths[0] * (a * b).sqrt()
                share = tie if ranks[i] == ranks[j] else a if ranks[i] < ranks[j] else b
                total = total - (share / (a + b + tie)).log() / math.comb(len(seen), 2) / len(group.ranks)
                ties.append(float(ranks[i] == ranks[j]))
                expected.append((tie / (a + b + tie)).item())
    return total, sum(ties) / len(ties), sum(expected) / len(expected)


def davidson_luce(group, utilities, strengths):
    """Return the loss of a group, and (ties, expected ties) among its choices."""
    total, ties, expected = torch.zeros(()), [], []
    of_size = [torch.ones(()), *strengths]

    def term(chosen):
        return of_size[len(chosen) - 1] * sum(utilities[i] for i in chosen).div(len(chosen)).exp()

    for who, ranks in enumerate(group.ranks):
        rest, k = judged(group, who), sum(rank is not None for rank in ranks)
        while len(rest) > 1:
            chosen = [i for i in rest if rest[i] == min(rest.values())]
            sizes = range(1, min(len(of_size), len(rest)) + 1)
            terms = {size: sum(map(term, itertools.combinations(rest, size))) for size in sizes}
            total = total - (term(chosen) / sum(terms.values())).log() / (k - 1) / len(group.ranks)
            ties.append(float(len(chosen) > 1))
            expected.append(1 - (terms[1] / sum(terms.values())).item())
            rest = {i: rank for i, rank in rest.items() if i not in chosen}
    return total, sum(ties) / len(ties), sum(expected) / len(expected)


class Both(nn.Module):
    """A model with the logarithms of its tie strengths."""

    def __init__(self, model, log_strengths):
        super().__init__()
        self.model, self.log_strengths = model, nn.Parameter(log_strengths.clone())


def train_again(settings, training, train, model, utilities_of, loss_of):
    """Train by the second route.

    Args:
        settings: Settings of the stage.
        training: The run's batches and first weights.
        train: The groups.
        model: The model, with the run's first weights.
        utilities_of: Group → the utilities of its responses.
        loss_of: The loss.

    Returns:
        The model with its tie strengths, and {figure: value} of each step.
    """
    both = Both(model, training.start[NAME])
    optimizer, rows = plain.AdamW(both, settings.max_grad_norm), []
    names = [name for name, _ in both.named_parameters()]
    optimizer.decays = [0.0 if "norm" in name or "log_strengths" in name else settings.weight_decay for name in names]
    for batch in training.batches:
        found = [loss_of(train[i], utilities_of(train[i]), both.log_strengths.exp()) for i in batch]
        loss = sum(value for value, _, _ in found) / len(batch)
        before = both.log_strengths.detach().clone()
        norm = optimizer.step(plain.gradients_of(loss, both), settings.learning_rate)
        with torch.no_grad():
            factor = settings.tie_learning_rate / settings.learning_rate
            both.log_strengths.copy_(before + factor * (both.log_strengths - before))
        means = [sum(figures) / len(batch) for figures in zip(*[f[1:] for f in found], strict=True)]
        rows.append({"loss": loss.item(), "ties": means[0], "ties_expected": means[1], "grad_norm": norm})
    return both, rows


def run(chain, stage, module, folder, rankings, choices):
    """Run a stage; return the finished run, its training and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, module)
        settings = [f"{stage}.{key}={x}" for key, x in choices.items()]
        finished = chain.run(stage, folder, *settings, inputs={"rankings": rankings})
    return finished, trainings[0], getattr(chain.experiment(*settings), stage)


LOSSES = [("davidson", davidson), ("davidson_luce", davidson_luce)]


@pytest.mark.parametrize(("loss_type", "loss_of"), LOSSES)
def test_a_reward_model_learns_scores_and_tie_strengths(loss_type, loss_of, chain, rankings, tmp_path):
    finished, training, settings = run(chain, "rm", rm, tmp_path / "rm", rankings, RM | {"loss_type": loss_type})
    train, held = (groups_of(chain, rankings, f"{name}.jsonl") for name in ("train", "validation"))
    assert any(not g.pairs() for g in train) and max(map(max, training.batches)) == len(train) - 1
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(chain.root / "sft/model", num_labels=1).eval()
    model.config.reward_bias = 0.0
    with torch.no_grad():
        model.score.weight.copy_(training.start["score.weight"])

    def scores(group):
        return torch.stack([plain.score(model, group.prompt, response) for response in group.responses])

    both, rows = train_again(settings, training, train, model, lambda group: scores(group).double(), loss_of)
    for row, expected in zip(finished.rows("metrics.jsonl"), rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert rows[0]["ties"] > 0.3
    published = plain.scalar_model(finished.folder / "model")  # transformers finds every weight that it expects
    with torch.no_grad():  # single weights may differ, where a gradient is nothing but rounding
        for g in held:
            theirs = torch.stack([plain.score(published, g.prompt, response) for response in g.responses])
            assert theirs + published.config.reward_bias == pytest.approx(scores(g).numpy(), abs=1e-4)
    strengths = both.log_strengths.exp().tolist()
    assert finished.figures["tie_strengths"] == pytest.approx(strengths, rel=1e-4)
    assert len(strengths) == (1 if loss_type == "davidson" else 4 - 1)
    assert not torch.allclose(both.log_strengths, training.start[NAME], atol=0.02)
    with torch.no_grad():
        found = [loss_of(g, scores(g), both.log_strengths.exp()) for g in held]
    expected = [sum(x) / len(held) for x in zip(*[(v.item(), t, e) for v, t, e in found], strict=True)]
    last = finished.rows("evaluations.jsonl")[-1]
    assert [last[key] for key in ("loss", "ties", "ties_expected")] == pytest.approx(expected, rel=1e-4)
    assert last["tie_strength"] == pytest.approx(strengths[0], rel=1e-4)
    margins = [(s[i] - s[j]).item() for g in held for s in [scores(g).detach()] for i, j, _ in g.pairs()]
    assert finished.figures["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert " tied; " in finished.said and "left out" not in finished.said


@pytest.mark.parametrize(("loss_type", "loss_of"), LOSSES)
def test_dpo_has_log_ratios_in_place_of_scores(loss_type, loss_of, chain, rankings, tmp_path):
    choices = DPO | {"loss_type": loss_type, "per_device_train_tokens": 90}
    finished, training, settings = run(chain, "dpo", dpo, tmp_path / "dpo", rankings, choices)
    train = groups_of(chain, rankings, "train.jsonl")
    model, reference = (plain.language_model(chain.root / "sft/model") for _ in range(2))

    def logps(policy, group):
        return torch.stack([plain.token_logps(policy, group.prompt, response).sum() for response in group.responses])

    def rewards(group):
        with torch.no_grad():
            ref = logps(reference, group)
        return settings.beta * (logps(model, group) - ref).double()

    both, rows = train_again(settings, training, train, model, rewards, loss_of)
    for row, expected in zip(finished.rows("metrics.jsonl"), rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert plain.largest_difference(plain.language_model(finished.folder / "model"), model) < 1e-5
    assert finished.figures["tie_strengths"] == pytest.approx(both.log_strengths.exp().tolist(), rel=1e-4)
    # the figures of pairs are means over the prompts that have one
    with torch.no_grad():
        paired = [(rewards(g), g.pairs()) for g in groups_of(chain, rankings, "validation.jsonl") if g.pairs()]
    margins = [sum((r[i] - r[j]).item() for i, j, _ in pairs) / len(pairs) for r, pairs in paired]
    assert finished.figures["rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)


def test_a_stated_strength_stays(chain, rankings, tmp_path):
    choices = RM | {"loss_type": "davidson_luce", "tie_strength": 0.7, "tie_learning_rate": "null", "max_steps": 1}
    finished, training, _ = run(chain, "rm", rm, tmp_path / "rm", rankings, choices)
    assert NAME not in training.start
    assert finished.figures["tie_strengths"] == pytest.approx([0.7] * 3)


def test_other_losses_say_how_many_ties_they_leave_out(chain, rankings, tmp_path):
    finished, *_ = run(chain, "rm", rm, tmp_path / "rm", rankings, {"max_steps": 1, "max_length": 48})
    groups, report = load_groups(rankings / "train.jsonl", chain.tokenizer, LengthLimit(48, "error", "rm"))
    assert f", {report.ties} tied (left out;" in finished.said
    by_hand = sum(
        group.ranks[who][i] == group.ranks[who][j] is not None and group.responses[i] != group.responses[j]
        for group in groups_of(chain, rankings, "train.jsonl")
        for who, _ in enumerate(group.ranks)
        for i, j in itertools.combinations(range(len(group.responses)), 2)
    )
    assert report.ties == by_hand > count_ties(groups) and all(has_pair(groups))
    both, _ = load_groups(rankings / "train.jsonl", chain.tokenizer, LengthLimit(48, "error", "rm"), with_ties=True)
    assert len(both) > len(groups) and count_ties(both) == by_hand and sum(has_pair(both)) == len(groups)
    assert most_tied(both) == most_tied(list(both)) == 4 and count_ties(list(both)) == by_hand


REFUSED = [
    (["rm.tie_strength=1"], "rm.tie_strength: has no effect with rm.loss_type sigmoid"),
    (["dpo.tie_learning_rate=1"], "dpo.tie_learning_rate: has no effect"),
    (["rm.loss_type=davidson", "rm.label_smoothing=0.1"], "rm.label_smoothing: has no effect"),
    (["rm.loss_type=davidson", "rm.margin_coef=1"], "rm.margin_coef: has no effect"),
    (["rm.loss_type=davidson", "rm.tie_strength=1", "rm.tie_learning_rate=1"], "rm.tie_learning_rate: has no effect"),
    (["dpo.loss_type=[davidson, davidson_luce]"], "two models of the same ties"),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_settings_without_effect_are_refused(settings, line, chain):
    with pytest.raises(UserError, match=line):
        chain.experiment(*settings)


def test_the_first_strengths_are_the_most_likely_of_equal_scores():
    """Of pairs ν/(2 + ν) is the share of ties; of rankings the likelihood has no slope there."""
    groups = [PromptGroup([1], [[2], [3], [4], [5]], ranks) for ranks in [(1, 1, 2, 3), (1, 2, 2, 2), (2, 1, 3, 3)]]
    counted = count_choices(groups, pairs=True)
    assert counted == Counter({(1, 2): 13, (2, 2): 5})
    (strength,) = strengths_at_equal_scores(counted, 2)
    assert strength / (2 + strength) == pytest.approx(5 / 18, rel=0.1)

    counted = count_choices(groups, pairs=False)
    assert counted == Counter({(2, 4): 1, (1, 2): 1, (1, 4): 2, (3, 3): 1, (1, 3): 1, (2, 2): 1})
    many = Counter({key: 1000 * n for key, n in counted.items()})  # few pseudo-counts beside them

    def loss(theta):
        log = [0.0, *theta]
        total = 0.0
        for (size, out_of), n in many.items():
            terms = [math.comb(out_of, t) * math.exp(log[t - 1]) for t in range(1, 4)]
            total -= n * (log[size - 1] - math.log(sum(terms)))
        return total / 1000

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    found = strengths_at_equal_scores(many, 3)
    assert [math.log(x) for x in found] == pytest.approx(best, abs=2e-3)


def test_without_ties_a_strength_begins_above_nothing():
    section = DPOSettings(loss_type=["davidson"])
    groups = [PromptGroup([1], [[2], [3]], (1, 2))] * 100
    model = tie_model(section, section.loss_type, groups, [], "cpu")
    assert 0 < model.log_strengths.exp().item() < 0.02
    assert tie_model(DPOSettings(), ["sigmoid"], groups, [], "cpu") is None
