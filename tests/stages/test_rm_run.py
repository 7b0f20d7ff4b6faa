"""Check the stage rm against a second computation with plain transformers.

It takes one response at a time, with the pairs written out. From the run it takes only the head's
initial weights and the prompts of each batch.
"""

import copy
import itertools
import json
import math
import statistics

import pytest
import second_route as plain
import torch
from micro_chain import watch_fit, write_rows

from stages import rm
from stages.models.ensemble_folder import others_of
from stages.settings.policies import reward_models

STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_length": 48,
    "warmup_steps": 2,
    "eval_steps": 2,
    "bias_demonstrations": 10,
}
SHARES = [0.5, 1.0, 1.0, 0.55]  # of the peak rate: a warm-up of two steps, then a cosine to a tenth
PAIRS = STEPS | {
    "learning_rate": 5e-3,
    "label_smoothing": 0.1,
    "margin_coef": 0.7,
    "weight_decay": 0.5,
    "max_grad_norm": 0.1,
    "per_device_train_tokens": 90,  # micro-batches of several sizes
    "ensemble": 2,
}
ORDERS = STEPS | {"learning_rate": 4e-2, "loss_type": "plackett_luce", "keep": "best", "eval_steps": 1}


class SecondRoute:
    """A reward model that trains on groups: its loss, its steps and its held-out figures."""

    def __init__(self, chain, settings, start: dict):
        from transformers import AutoModelForSequenceClassification

        self.settings = settings
        self.model = AutoModelForSequenceClassification.from_pretrained(chain.root / "sft/model", num_labels=1).eval()
        self.model.config.reward_bias = 0.0
        self.trunk = {name: p.detach().clone() for name, p in self.model.named_parameters() if "score" not in name}
        with torch.no_grad():
            self.model.score.weight.copy_(start["score.weight"])
        self.optimizer = plain.AdamW(self.model, settings.max_grad_norm, settings.weight_decay)

    def scores(self, group) -> torch.Tensor:
        return torch.stack([plain.score(self.model, group.prompt, response) for response in group.responses])

    def loss(self, group, scores) -> torch.Tensor:
        c = self.settings
        if c.loss_type == "plackett_luce":
            return plain.order_loss(group, scores)
        return plain.pairwise_loss(group, scores, c.label_smoothing, c.margin_coef)

    def step(self, groups: list, rate: float) -> dict[str, float]:
        """Take a step and return its row of metrics.jsonl; all prompts weigh the same."""
        scores = [self.scores(group) for group in groups]
        loss = sum(map(self.loss, groups, scores)) / len(groups)
        margins = [[(s[i] - s[j]).item() for i, j, _ in g.pairs()] for g, s in zip(groups, scores, strict=True)]
        norm = self.optimizer.step(plain.gradients_of(loss, self.model), rate)
        return {
            "loss": loss.item(),
            "accuracy": statistics.mean(statistics.mean(m > 0 for m in some) for some in margins),
            "margin": statistics.mean(map(statistics.mean, margins)),
            "grad_norm": norm,
            "lr": rate,
        }

    @torch.no_grad()
    def margins(self, groups: list) -> list[float]:
        """Return the margin of every pair, prompt by prompt."""
        return pair_margins(groups, [self.scores(group) for group in groups])

    @torch.no_grad()
    def held_out(self, groups: list) -> dict[str, float]:
        """Return a row of evaluations.jsonl.

        All pairs weigh the same in accuracy and margin, all prompts in the loss.
        """
        scores = [self.scores(group) for group in groups]
        margins = pair_margins(groups, scores)
        loss = statistics.mean(self.loss(group, some).item() for group, some in zip(groups, scores, strict=True))
        return {"loss": loss, "accuracy": accuracy(margins), "margin": statistics.mean(margins)}


def pair_margins(groups: list, scores: list) -> list[float]:
    return [(s[i] - s[j]).item() for g, s in zip(groups, scores, strict=True) for i, j, _ in g.pairs()]


def accuracy(margins: list[float]) -> float:
    return statistics.mean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)


def run_rm(chain, folder, choices, *more, **options):
    """Return the finished run, its trainings, training and held-out groups, and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, rm)
        settings = [f"rm.{key}={x}" for key, x in choices.items()]
        finished = chain.run("rm", folder, *settings, *more, **options)
    groups = [plain.groups_of(chain.tokenizer, chain.rows(f"rankings/{x}.jsonl")) for x in ("train", "validation")]
    return finished, trainings, groups, chain.experiment(*settings).rm


def train_again(chain, settings, training, train, held):
    """Return the second computation, its rows of both journals, and the model after each step."""
    route = SecondRoute(chain, settings, training.start)
    rows, looks, models = [], {0: route.held_out(held)}, {0: copy.deepcopy(route.model)}
    for step, (batch, share) in enumerate(zip(training.batches, SHARES, strict=True), 1):
        rows.append(route.step([train[i] for i in batch], share * settings.learning_rate))
        if step % settings.eval_steps == 0:
            looks[step], models[step] = route.held_out(held), copy.deepcopy(route.model)
    return route, rows, looks, models


@pytest.fixture(scope="module")
def pairs(chain, tmp_path_factory):
    manifests = {"rankings": {"digest": "rankings", "metrics": {"accuracy_ceiling": 0.875}}}
    return run_rm(chain, tmp_path_factory.mktemp("rm") / "rm", PAIRS, manifests=manifests)


@pytest.fixture(scope="module")
def pairs_again(chain, pairs):
    """Return the second computation of both models."""
    _, trainings, (train, held), settings = pairs
    return [train_again(chain, settings, training, train, held) for training in trainings]


class TestPairs:
    """Check two models on all pairs, with smoothed labels, margins and weight decay."""

    def test_the_published_models(self, pairs, pairs_again):
        """Training takes each prompt of train.jsonl once, however many labelers it had."""
        finished, trainings, (train, _), _ = pairs
        assert any(len(group.ranks) == 2 for group in train) and len(train) == 24
        for folder, training, (route, *_) in zip(("model", "ensemble/1"), trainings, pairs_again, strict=True):
            assert all(torch.equal(training.start[name], p) for name, p in route.trunk.items())
            assert plain.largest_difference(plain.scalar_model(finished.folder / folder), route.model) < 1e-5

    def test_the_two_differ_in_their_heads_and_in_the_order_of_their_data(self, pairs):
        one, other = pairs[1]
        assert one.batches != other.batches
        assert not torch.equal(one.start["score.weight"], other.start["score.weight"])

    def test_every_step(self, pairs, pairs_again):
        found = pairs[0].rows("metrics.jsonl")
        assert [row.pop("step") for row in found] == list(range(1, 9))
        expected = pairs_again[0][1] + pairs_again[1][1]
        for row, again in zip(found, expected, strict=True):
            assert row == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in again.items()}
        assert max(row["grad_norm"] for row in found) > 2 * PAIRS["max_grad_norm"]

    def test_held_out_figures_are_of_validation_jsonl(self, pairs, pairs_again):
        found = pairs[0].rows("evaluations.jsonl")
        assert [row.pop("step") for row in found] == [0, 2, 4, 6, 8]
        expected = [*pairs_again[0][2].values(), *list(pairs_again[1][2].values())[1:]]
        for row, again in zip(found, expected, strict=True):
            assert row == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in again.items()}

    def test_how_far_it_is_trusted(self, pairs, pairs_again):
        """Accuracy counts every held-out pair of every labeler, scored by the published models."""
        (finished, _, (_, held), _), (route, *_) = pairs, pairs_again[0]
        figures, margins = finished.figures, route.margins(held)
        owners = [(group, *pair) for group in held for pair in group.pairs()]
        assert figures["n_pairs"] == len(margins) and figures["accuracy"] == pytest.approx(accuracy(margins))
        assert 0.2 < figures["accuracy"] < 0.8, "else much that is wrong would give the same"
        low, high = figures["accuracy_ci95"]
        assert low < figures["accuracy"] < high
        for name, key_of in (
            ("accuracy_by_k", lambda group, i, j, who: group.judged(who)),
            ("accuracy_by_labeler", lambda group, i, j, who: group.labelers[who]),
            ("accuracy_by_rank_distance", lambda group, i, j, who: group.ranks[who][j] - group.ranks[who][i]),
        ):
            parts: dict = {}
            for owner, margin in zip(owners, margins, strict=True):
                parts.setdefault(str(key_of(*owner)), []).append(margin)
            published = {key: (part["accuracy"], part["n_pairs"]) for key, part in figures[name].items()}
            assert len(parts) > 1 and published == {
                key: (pytest.approx(accuracy(some)), len(some)) for key, some in parts.items()
            }, name
        assert figures["accuracy_ceiling"] == 0.875, "what the stage rankings says of its labelers"

    def test_its_calibration(self, pairs, pairs_again):
        """ece is Σ share · |right − confidence| over ten bins of σ(|margin|)."""
        margins, bins = pairs_again[0][0].margins(pairs[2][1]), {}
        for margin in margins:
            confidence = 1 / (1 + math.exp(-abs(margin)))
            bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append((confidence, accuracy([margin])))
        expected = sum(abs(sum(c for c, _ in some) - sum(r for _, r in some)) for some in bins.values()) / len(margins)
        assert pairs[0].figures["ece"] == pytest.approx(expected, abs=1e-4)

    def test_labelers_agree_as_the_file_says(self, pairs):
        both = [group for group in pairs[2][1] if len(group.ranks) == 2]
        same = total = 0
        for group in both:
            for i, j in itertools.combinations(range(len(group.responses)), 2):
                (a, b), (c, d) = ((ranks[i], ranks[j]) for ranks in group.ranks)
                if None not in (a, b, c, d) and a != b and c != d:
                    same, total = same + ((a < b) == (c < d)), total + 1
        assert pairs[0].figures["labeler_agreement"] == pytest.approx(same / total) and total > 3

    def test_accuracy_of_their_mean(self, pairs, pairs_again):
        held = pairs[2][1]
        both = zip(*(route.margins(held) for route, *_ in pairs_again), strict=True)
        assert pairs[0].figures["ensemble_accuracy"] == pytest.approx(accuracy([a + b for a, b in both]))

    def test_demonstrations_score_0_on_average(self, pairs, chain):
        """reward_bias is the mean of a model's own logits; samples show scores minus it."""
        finished = pairs[0]
        shown = {row["response"]: row["score"] for row in finished.rows("samples.jsonl")}
        for folder in ("model", "ensemble/1"):
            model = plain.scalar_model(finished.folder / folder)
            scores = [
                plain.score(model, plain.prompt_ids(chain.tokenizer, row["prompt"]),
                            plain.response_ids(chain.tokenizer, row["completion"])).item()
                for row in chain.rows("demonstrations.jsonl")
            ]  # fmt: skip
            assert statistics.mean(scores) == pytest.approx(0.0, abs=1e-5)
            assert abs(model.config.reward_bias) > 1e-3
            if folder == "model":
                assert finished.figures["reward_bias"] == model.config.reward_bias
                said = [(row["prompt"], text) for row in chain.rows("rankings/validation.jsonl")
                        for text in row["responses"] if text in shown]  # fmt: skip
                scored = {
                    text: plain.score(
                        model, plain.prompt_ids(chain.tokenizer, prompt), plain.response_ids(chain.tokenizer, text)
                    ).item()
                    for prompt, text in said
                }
                assert shown == {text: pytest.approx(x, abs=1e-4) for text, x in scored.items()} and len(shown) > 8


def test_whole_orders_and_the_best_model(chain, tmp_path):
    """With plackett_luce and keep: best, the model of the lowest held-out loss is published."""
    finished, (training,), (train, held), settings = run_rm(chain, tmp_path / "rm", ORDERS)
    _, rows, looks, models = train_again(chain, settings, training, train, held)
    for row, again in zip(finished.rows("metrics.jsonl"), rows, strict=True):
        assert row["loss"] == pytest.approx(again["loss"], rel=1e-3)
    best = min(looks, key=lambda step: looks[step]["loss"])
    assert best not in (0, 4), "take another rate"
    assert finished.figures["best_step"] == best
    found = plain.scalar_model(finished.folder / "model")
    assert plain.largest_difference(found, models[best]) < 1e-3 < 1e-2 < plain.largest_difference(found, models[4])
    assert finished.figures["accuracy"] == pytest.approx(looks[best]["accuracy"])


def test_the_mean_is_over_as_many_demonstrations_as_asked_for_of_those_that_fit(chain, tmp_path):
    """Nine demonstrations are scored, and none of the four that are too long."""
    rows = chain.rows("demonstrations.jsonl")
    long = {"prompt": "hello ?", "completion": "the fox is red . " * 20}
    write_rows(tmp_path / "some.jsonl", [row for short in rows[:8:2] for row in (short, long)] + rows[1:8:2] + rows[8:])
    choices = STEPS | {"max_steps": 1, "bias_demonstrations": 9}
    finished, *_ = run_rm(chain, tmp_path / "rm", choices, f"data.demonstrations={tmp_path}/some.jsonl")
    config = json.loads((finished.folder / "model/config.json").read_text())
    model = plain.scalar_model(finished.folder / "model")
    model.config.reward_bias = 0.0
    with torch.no_grad():
        scores = [
            plain.score(model, plain.prompt_ids(chain.tokenizer, row["prompt"]),
                        plain.response_ids(chain.tokenizer, row["completion"])).item()
            for row in rows
        ]  # fmt: skip
    means = [statistics.mean(some) for some in itertools.combinations(scores, 9)]
    assert min(abs(mean - config["reward_bias"]) for mean in means) < 1e-6
    assert config["reward_bias"] != pytest.approx(statistics.mean(scores), abs=1e-6)


class TestHeldOut:
    """A further model is trained, which only evaluate uses."""

    def test_by_default_where_people_ranked(self, chain):
        people, world = chain.experiment("rm.held_out=null"), chain.experiment("rm.held_out=null", config="world.yaml")
        assert reward_models(people) == ["model", "held_out/model"]
        assert reward_models(world) == ["model"], "there is a gold scorer"
        assert reward_models(chain.experiment("rm.held_out=null", "rm.ensemble=3")) == [
            "model", "ensemble/1", "ensemble/2", "held_out/model",
        ]  # fmt: skip
        assert reward_models(chain.experiment("rm.held_out=true", config="world.yaml"))[-1] == "held_out/model"

    def test_it_is_of_another_seed_and_no_member_of_the_ensemble(self, chain, tmp_path):
        choices = STEPS | {"ensemble": 2, "held_out": "true", "max_steps": 2}
        finished, (one, two, other), (_, held), _ = run_rm(chain, tmp_path / "rm", choices)
        assert "2 steps for each of 3 models" in finished.said
        assert other.batches not in (one.batches, two.batches)
        for member in (one, two):
            assert not torch.equal(other.start["score.weight"], member.start["score.weight"])
        assert [path.name for path in others_of(finished.folder / "model")] == ["1"]
        models = [plain.scalar_model(finished.folder / name) for name in ("model", "ensemble/1", "held_out/model")]
        margins = []
        with torch.no_grad():
            for model in models:
                scores = [torch.stack([plain.score(model, g.prompt, r) for r in g.responses]) for g in held]
                margins.append(pair_margins(held, scores))
        both = [a + b for a, b in zip(*margins[:2], strict=True)]
        assert finished.figures["held_out_accuracy"] == pytest.approx(accuracy(margins[2]))
        assert finished.figures["ensemble_accuracy"] == pytest.approx(accuracy(both))
        assert models[2].config.reward_bias not in (0.0, models[0].config.reward_bias)

    def test_the_first_model_does_not_depend_on_it(self, chain, tmp_path):
        paths = []
        for held_out in ("true", "false"):
            finished, *_ = run_rm(chain, tmp_path / held_out, STEPS | {"max_steps": 2, "held_out": held_out})
            paths.append(finished.folder / "model" / "model.safetensors")
        assert paths[0].read_bytes() == paths[1].read_bytes()
