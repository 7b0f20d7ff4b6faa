"""Test the reward model from the rankings to the published folder against a second computation.

The second route uses transformers only, one response at a time, with the pairs written out. It
takes from the run only the head's first weights and which prompts each batch holds.
"""

import copy
import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import second_route as plain
import torch
from micro_chain import watch_fit, write_rows

from data.records import Ranking, prompt_key
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
# shares of the peak rate: a warm-up of two steps, then a cosine decay to a tenth
SHARES = [0.5, 1.0, 1.0, 0.55]
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
    """Train a reward model on groups."""

    def __init__(self, chain, settings, start: dict):
        """Load the SFT model with a scalar head.

        Args:
            chain: The micro chain.
            settings: Settings of the stage.
            start: The run's first weights, of which the head's are taken.
        """
        from transformers import AutoModelForSequenceClassification

        self.settings = settings
        self.model = AutoModelForSequenceClassification.from_pretrained(chain.root / "sft/model", num_labels=1).eval()
        self.model.config.reward_bias = 0.0
        self.trunk = {name: p.detach().clone() for name, p in self.model.named_parameters() if "score" not in name}
        with torch.no_grad():
            self.model.score.weight.copy_(start["score.weight"])
        self.optimizer = plain.AdamW(self.model, settings.max_grad_norm, settings.weight_decay)

    def scores(self, group) -> torch.Tensor:
        """Return (K,): the score of each response."""
        return torch.stack([plain.score(self.model, group.prompt, response) for response in group.responses])

    def loss(self, group, scores) -> torch.Tensor:
        """Return the loss of one group."""
        c = self.settings
        if c.loss_type == "plackett_luce":
            return plain.order_loss(group, scores)
        return plain.pairwise_loss(group, scores, c.label_smoothing, c.margin_coef)

    def step(self, groups: list, rate: float) -> dict[str, float]:
        """Take one step and return its row of metrics.jsonl.

        Every prompt has the same weight, whatever its K.
        """
        scores = [self.scores(group) for group in groups]
        loss = sum(map(self.loss, groups, scores)) / len(groups)
        margins = [[(s[i] - s[j]).item() for i, j, _ in g.pairs()] for g, s in zip(groups, scores, strict=True)]
        norm = self.optimizer.step(plain.gradients_of(loss, self.model), rate)
        return {
            "loss": loss.item(),
            "accuracy": statistics.mean(statistics.mean(m > 0 for m in group) for group in margins),
            "margin": statistics.mean(map(statistics.mean, margins)),
            "grad_norm": norm,
            "lr": rate,
        }

    @torch.no_grad()
    def margins(self, groups: list) -> list[float]:
        """Return the margins of all pairs, prompt by prompt."""
        return pair_margins(groups, [self.scores(group) for group in groups])

    @torch.no_grad()
    def held_out(self, groups: list) -> dict[str, float]:
        """Return a row of evaluations.jsonl.

        All pairs have the same weight in accuracy and margin, all prompts in the loss.
        """
        scores = [self.scores(group) for group in groups]
        margins = pair_margins(groups, scores)
        losses = [self.loss(*group_and_scores).item() for group_and_scores in zip(groups, scores, strict=True)]
        loss = statistics.mean(losses)
        return {"loss": loss, "accuracy": accuracy(margins), "margin": statistics.mean(margins)}


def pair_margins(groups: list, scores: list) -> list[float]:
    """Return the score differences of all pairs, prompt by prompt."""
    return [(s[i] - s[j]).item() for g, s in zip(groups, scores, strict=True) for i, j, _ in g.pairs()]


def accuracy(margins: list[float]) -> float:
    """Return the share of positive margins; a margin of 0 counts half."""
    return statistics.mean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)


def run_rm(chain, folder, choices, *more, **options):
    """Run the stage.

    Args:
        chain: The micro chain.
        folder: For the run's files.
        choices: Settings of the section rm.
        more: Further settings, `section.key=value`.
        options: As of `MicroChain.run`.

    Returns:
        The finished run; its trainings; the groups of train.jsonl and of validation.jsonl; the
        settings.
    """
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, rm)
        settings = [f"rm.{key}={x}" for key, x in choices.items()]
        finished = chain.run("rm", folder, *settings, *more, **options)
    groups = [plain.groups_of(chain.tokenizer, chain.rows(f"rankings/{x}.jsonl")) for x in ("train", "validation")]
    return finished, trainings, groups, chain.experiment(*settings).rm


def train_again(chain, settings, training, train, validation):
    """Repeat a training by the second route.

    Args:
        chain: The micro chain.
        settings: Settings of the stage.
        training: The run's batches and first weights.
        train: Groups of train.jsonl.
        validation: Groups of validation.jsonl.

    Returns:
        The second route after its steps; rows of metrics.jsonl; {step: row} of evaluations.jsonl;
        {step: model} at these evaluations.
    """
    route = SecondRoute(chain, settings, training.start)
    rows, evaluations, models = [], {0: route.held_out(validation)}, {0: copy.deepcopy(route.model)}
    for step, (batch, share) in enumerate(zip(training.batches, SHARES, strict=True), 1):
        rows.append(route.step([train[i] for i in batch], share * settings.learning_rate))
        if step % settings.eval_steps == 0:
            evaluations[step], models[step] = route.held_out(validation), copy.deepcopy(route.model)
    return route, rows, evaluations, models


@pytest.fixture(scope="module")
def pairs(chain, tmp_path_factory):
    manifests = {"rankings": {"digest": "rankings", "metrics": {"accuracy_ceiling": 0.875}}}
    return run_rm(chain, tmp_path_factory.mktemp("rm") / "rm", PAIRS, manifests=manifests)


@pytest.fixture(scope="module")
def pairs_again(chain, pairs):
    """Return the second route's results for both models."""
    _, trainings, (train, validation), settings = pairs
    return [train_again(chain, settings, training, train, validation) for training in trainings]


class TestPairs:
    """Test two models on all pairs, with label smoothing, margins and weight decay."""

    def test_the_published_models(self, pairs, pairs_again):
        """They start from the SFT weights and see every prompt once, whatever its labelers."""
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
        rows = pairs[0].rows("metrics.jsonl")
        assert [row.pop("step") for row in rows] == list(range(1, 9))
        for row, expected in zip(rows, pairs_again[0][1] + pairs_again[1][1], strict=True):
            assert row == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in expected.items()}
        assert max(row["grad_norm"] for row in rows) > 2 * PAIRS["max_grad_norm"]

    def test_held_out_figures_are_of_validation_jsonl(self, pairs, pairs_again):
        rows = pairs[0].rows("evaluations.jsonl")
        assert [row.pop("step") for row in rows] == [0, 2, 4, 6, 8]
        every = [*pairs_again[0][2].values(), *list(pairs_again[1][2].values())[1:]]
        for row, expected in zip(rows, every, strict=True):
            assert row == {key: pytest.approx(x, rel=1e-4, abs=1e-5) for key, x in expected.items()}

    def test_accuracy_overall_and_by_k_labeler_and_rank_distance(self, pairs, pairs_again):
        """Every held-out pair of every labeler counts; the figures are the published model's."""
        (finished, _, (_, validation), _), (route, *_) = pairs, pairs_again[0]
        figures, margins = finished.figures, route.margins(validation)
        owners = [(group, *pair) for group in validation for pair in group.pairs()]
        assert figures["n_pairs"] == len(margins) and figures["accuracy"] == pytest.approx(accuracy(margins))
        assert 0.2 < figures["accuracy"] < 0.8, "an extreme accuracy would hide many faults"
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
                key: (pytest.approx(accuracy(part)), len(part)) for key, part in parts.items()
            }, name
        assert figures["accuracy_ceiling"] == 0.875, "from the manifest of rankings"

    def test_its_calibration(self, pairs, pairs_again):
        """The error is Σ share · |accuracy − confidence| over ten bins of σ(|margin|)."""
        margins, bins = pairs_again[0][0].margins(pairs[2][1]), {}
        for margin in margins:
            confidence = 1 / (1 + math.exp(-abs(margin)))
            bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append((confidence, accuracy([margin])))
        gaps = [abs(sum(c for c, _ in entries) - sum(r for _, r in entries)) for entries in bins.values()]
        expected = sum(gaps) / len(margins)
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
        validation = pairs[2][1]
        both = zip(*(route.margins(validation) for route, *_ in pairs_again), strict=True)
        assert pairs[0].figures["ensemble_accuracy"] == pytest.approx(accuracy([a + b for a, b in both]))

    def test_demonstrations_score_0_on_average(self, pairs, chain):
        """Each reward_bias is the mean of the model's logits; shown scores exclude it."""
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
                samples = [(row["prompt"], text) for row in chain.rows("rankings/validation.jsonl")
                           for text in row["responses"] if text in shown]  # fmt: skip
                scored = {
                    text: plain.score(
                        model, plain.prompt_ids(chain.tokenizer, prompt), plain.response_ids(chain.tokenizer, text)
                    ).item()
                    for prompt, text in samples
                }
                assert shown == {text: pytest.approx(x, abs=1e-4) for text, x in scored.items()} and len(shown) > 8


def test_whole_orders_and_the_best_model(chain, tmp_path):
    """The model of the lowest held-out Plackett–Luce loss is published, not the last one."""
    finished, (training,), (train, validation), settings = run_rm(chain, tmp_path / "rm", ORDERS)
    _, rows, evaluations, models = train_again(chain, settings, training, train, validation)
    for row, expected in zip(finished.rows("metrics.jsonl"), rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    best = min(evaluations, key=lambda step: evaluations[step]["loss"])
    assert best not in (0, 4), "choose another learning rate"
    assert finished.figures["best_step"] == best
    published = plain.scalar_model(finished.folder / "model")
    assert plain.largest_difference(published, models[best]) < 1e-3
    assert plain.largest_difference(published, models[4]) > 1e-2
    assert finished.figures["accuracy"] == pytest.approx(evaluations[best]["accuracy"])


def test_a_head_that_starts_at_zero(chain, tmp_path):
    """Every pair is a toss-up at first; then the steps are those of the second route."""
    choices = STEPS | {"learning_rate": 5e-3, "head_init": "zero", "keep": "last"}
    finished, (training,), (train, validation), settings = run_rm(chain, tmp_path / "rm", choices)
    rows = finished.rows("metrics.jsonl")
    assert rows[0]["margin"] == 0 and 0.6 < rows[0]["loss"] < math.log(2)  # log 2 a pair; what is tied counts 0
    _, expected, _, models = train_again(chain, settings, training, train, validation)
    for row, again in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(again["loss"], rel=1e-3)
    assert plain.largest_difference(plain.scalar_model(finished.folder / "model"), models[4]) < 1e-3
    several = choices | {"max_steps": 1, "ensemble": 2, "held_out": "true"}
    _, trainings, *_ = run_rm(chain, tmp_path / "several", several)
    assert len(trainings) == 3 and not any(each.start["score.weight"].any() for each in trainings)
    start = f"rm.start_from={finished.folder / 'model'}"
    _, (one, two, judge), *_ = run_rm(chain, tmp_path / "from", several, start)
    learned = plain.scalar_model(finished.folder / "model").score.weight
    assert torch.equal(one.start["score.weight"], learned) and torch.equal(two.start["score.weight"], learned)
    assert not judge.start["score.weight"].any(), "what only judges starts anew"


def test_the_bias_is_over_the_requested_number_of_demonstrations_that_fit(chain, tmp_path):
    """It is the mean over nine of the ten that fit; the four that are too long do not count."""
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
    means = [statistics.mean(nine) for nine in itertools.combinations(scores, 9)]
    assert min(abs(mean - config["reward_bias"]) for mean in means) < 1e-6
    assert config["reward_bias"] != pytest.approx(statistics.mean(scores), abs=1e-6)


class TestHeldOut:
    """Test the held-out reward model, which only the stage evaluate uses."""

    def test_by_default_where_people_ranked(self, chain):
        people, world = chain.experiment("rm.held_out=null"), chain.experiment("rm.held_out=null", config="world.yaml")
        assert reward_models(people, has_judge=False) == ["model", "held_out/model"]
        assert reward_models(people, has_judge=True) == ["model", "judge/model"], "a judge says more"
        assert reward_models(world, has_judge=False) == ["model"], "there is a gold scorer"
        assert reward_models(chain.experiment("rm.held_out=null", "rm.ensemble=3"), has_judge=False) == [
            "model", "ensemble/1", "ensemble/2", "held_out/model",
        ]  # fmt: skip
        asked = chain.experiment("rm.held_out=true", config="world.yaml")
        assert reward_models(asked, has_judge=True) == ["model", "held_out/model", "judge/model"]

    def test_it_is_of_another_seed_and_no_member_of_the_ensemble(self, chain, tmp_path):
        choices = STEPS | {"ensemble": 2, "held_out": "true", "max_steps": 2}
        finished, (one, two, other), (_, validation), _ = run_rm(chain, tmp_path / "rm", choices)
        assert "2 steps for each of 3 models" in finished.said
        assert other.batches not in (one.batches, two.batches)
        for member in (one, two):
            assert not torch.equal(other.start["score.weight"], member.start["score.weight"])
        assert [path.name for path in others_of(finished.folder / "model")] == ["1"]
        models = [plain.scalar_model(finished.folder / name) for name in ("model", "ensemble/1", "held_out/model")]
        margins = []
        with torch.no_grad():
            for model in models:
                scores = [torch.stack([plain.score(model, g.prompt, r) for r in g.responses]) for g in validation]
                margins.append(pair_margins(validation, scores))

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


class TestJudge:
    """Test the model that learns from rankings kept for a judge."""

    def run(self, chain, tmp_path, **settings):
        """Run the stage on the chain's rankings, some of which are kept for the judge."""
        folder = tmp_path / "rankings"
        for side in ("train", "validation"):
            write_rows(folder / f"{side}.jsonl", chain.rows(f"rankings/{side}.jsonl"))
        kept = [row | {"id": f"{row['id']} kept", "prompt": f"kept {row['prompt']}"}
                for row in chain.rows("rankings/train.jsonl")[:12]]  # fmt: skip
        write_rows(folder / "judge.jsonl", kept)
        manifest = {"digest": "rankings", "metrics": {"judge": 12, "judge_labelers_apart": True}}
        more = {"inputs": {"rankings": folder}, "manifests": {"rankings": manifest}}
        return run_rm(chain, tmp_path / "rm", STEPS | {"max_steps": 6} | settings, **more)

    def test_it_learns_from_its_rankings_alone_and_changes_nothing_else(self, chain, tmp_path):
        finished, (first, judge), (train, _), _ = self.run(chain, tmp_path)
        bare, *_ = run_rm(chain, tmp_path / "bare", STEPS | {"max_steps": 6})
        for file in ("model/model.safetensors", "model/config.json"):
            assert (finished.folder / file).read_bytes() == (bare.folder / file).read_bytes(), file
        assert not (bare.folder / "judge").exists() and "judges" not in bare.figures
        groups = len({row["prompt"] for row in chain.rows("rankings/train.jsonl")[:12]})
        assert {i for batch in judge.batches for i in batch} <= set(range(groups)) and groups < len(train)
        assert len(judge.batches) == max(1, round(6 * groups / len(train))) < len(first.batches)
        assert not torch.equal(judge.start["score.weight"], first.start["score.weight"]), "its own seed"
        assert f"{len(judge.batches)} for a judge, on {groups} rankings of its own" in finished.said

    def test_its_accuracy_is_of_the_held_out_pairs(self, chain, tmp_path):
        finished, _, (_, validation), _ = self.run(chain, tmp_path)
        model = plain.scalar_model(finished.folder / "judge/model")
        with torch.no_grad():
            scores = [torch.stack([plain.score(model, g.prompt, r) for r in g.responses]) for g in validation]
        figures = finished.figures["judges"]["kept"]
        assert figures["accuracy"] == pytest.approx(accuracy(pair_margins(validation, scores)))
        assert figures["accuracy_ci95"][0] < figures["accuracy"] < figures["accuracy_ci95"][1]
        assert (figures["rankings"], figures["labelers_apart"]) == (12, True)
        assert model.config.reward_bias not in (0.0, plain.scalar_model(finished.folder / "model").config.reward_bias)


def test_rankings_of_prompts_that_the_world_does_not_know_are_clustered_by_prompt():
    """The stage reads the world for its demonstrations, too."""
    world = SimpleNamespace(knows=lambda prompt: prompt == "of the world", task=lambda prompt: "its task")
    known, other = (
        Ranking(id=prompt, prompt=prompt, responses=["a", "b"], ranks=[1, 2]) for prompt in ("of the world", "own")
    )
    assert rm.clusters_of([known], world) == {"of the world": "its task"}
    assert rm.clusters_of([known, other], world) == {r.id: prompt_key(r.prompt) for r in (known, other)}
