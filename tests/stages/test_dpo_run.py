"""Test DPO from the rankings to the published folder against a second computation.

The second route uses transformers only, one response at a time, with the pairs written out. It
takes from the run only which prompts each batch holds.
"""

import copy
import statistics

import pytest
import second_route as plain
import torch
from micro_chain import watch_fit, write_rows

from stages import dpo

STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_length": 48,
    "warmup_steps": 2,
    "sample_tokens": 0,
    "beta": 0.3,
}
# shares of the peak rate: a warm-up of two steps, then a cosine decay to a tenth
SHARES = [0.5, 1.0, 1.0, 0.55]
PAIRS = STEPS | {
    "learning_rate": 5e-3,
    "label_smoothing": 0.1,
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
    "per_device_train_tokens": 90,  # micro-batches of several sizes
    "eval_steps": 2,
}
ORDERS = STEPS | {
    "learning_rate": 2e-2,
    "loss_type": "[plackett_luce, sft]",
    "loss_weights": "[1.0, 0.3]",
    "keep": "best",
    "eval_steps": 1,
}


class SecondRoute:
    """Train a policy on groups against its own start as the reference."""

    def __init__(self, chain, settings, sft="sft/model"):
        """Load the policy.

        Args:
            chain: The micro chain.
            settings: Settings of the stage.
            sft: Folder of the policy below the chain's root.
        """
        self.settings = settings
        self.model = plain.language_model(chain.root / sft)
        self.reference = copy.deepcopy(self.model)
        self.optimizer = plain.AdamW(self.model, settings.max_grad_norm, settings.weight_decay)

    def logps(self, model, group) -> torch.Tensor:
        """Return (K,): the log-probability of each whole response with its EOS."""
        return torch.stack([plain.token_logps(model, group.prompt, response).sum() for response in group.responses])

    def evaluate(self, groups: list) -> tuple[torch.Tensor, dict]:
        """Return the loss and figures of a batch, in which all prompts have the same weight."""
        c, parts, pairs = self.settings, {name: [] for name in self.settings.loss_type}, []
        tokens = 0.0
        for group in groups:
            with torch.no_grad():
                ref = self.logps(self.reference, group)
            logps = self.logps(self.model, group)
            rewards = c.beta * (logps - ref)
            for name in parts:
                if name == "sft":
                    weights = first_by(group)
                    parts[name].append(-sum(weight * logps[i] for i, weight in weights.items()))
                    tokens += sum(weight * len(group.responses[i]) for i, weight in weights.items())
                elif name == "plackett_luce":
                    parts[name].append(plain.order_loss(group, rewards))
                else:
                    parts[name].append(plain.pairwise_loss(group, rewards, c.label_smoothing))
            pairs.append([(rewards[i].item(), rewards[j].item(), logps[i].item(), logps[j].item())
                          for i, j, _ in group.pairs()])  # fmt: skip
        parts = {name: sum(terms) / (tokens if name == "sft" else len(groups)) for name, terms in parts.items()}
        loss = sum(weight * parts[name] for name, weight in c.losses().items())

        def mean(figure) -> float:
            return statistics.mean(statistics.mean(map(figure, group_pairs)) for group_pairs in pairs)

        figures = {
            "loss": loss.item(),
            "rewards/chosen": mean(lambda pair: pair[0]),
            "rewards/rejected": mean(lambda pair: pair[1]),
            "rewards/margins": mean(lambda pair: pair[0] - pair[1]),
            "rewards/accuracies": mean(lambda pair: pair[0] > pair[1]),
            "logps/chosen": mean(lambda pair: pair[2]),
            "logps/rejected": mean(lambda pair: pair[3]),
        }
        if len(parts) > 1:
            figures |= {f"loss/{name}": x.item() for name, x in parts.items()}
        return loss, figures

    def step(self, groups: list, rate: float) -> dict[str, float]:
        """Take one step and return its row of metrics.jsonl."""
        loss, figures = self.evaluate(groups)
        norm = self.optimizer.step(plain.gradients_of(loss, self.model), rate)
        return figures | {"grad_norm": norm, "lr": rate}


def first_by(group) -> dict[int, float]:
    """Return the weight of each response that a labeler ranked first.

    Each labeler's weight is shared equally by the responses that it tied for the first place.
    """
    weights: dict[int, float] = {}
    for ranks in group.ranks:
        best = min(rank for rank in ranks if rank is not None)
        first = [i for i, rank in enumerate(ranks) if rank == best]
        for i in first:
            weights[i] = weights.get(i, 0.0) + 1 / len(first) / len(group.ranks)
    return weights


def run_dpo(chain, folder, choices, **options):
    """Run the stage; return the finished run, its training and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, dpo)
        settings = [f"dpo.{key}={x}" for key, x in choices.items()]
        finished = chain.run("dpo", folder, *settings, **options)
    return finished, trainings[0], chain.experiment(*settings).dpo


def train_again(chain, settings, training):
    """Repeat a training by the second route.

    Returns:
        The second route after its steps; rows of metrics.jsonl; {step: row} of evaluations.jsonl;
        {step: model} at these evaluations.
    """
    splits = ("train", "validation")
    train, validation = (plain.groups_of(chain.tokenizer, chain.rows(f"rankings/{x}.jsonl")) for x in splits)
    route = SecondRoute(chain, settings)
    rows, evaluations, models = [], {}, {}
    for step, share in enumerate([0.0, *SHARES]):
        if step:
            batch = [train[i] for i in training.batches[step - 1]]
            rows.append(route.step(batch, share * settings.learning_rate))
        if step % settings.eval_steps == 0:
            with torch.no_grad():
                evaluations[step], models[step] = route.evaluate(validation)[1], copy.deepcopy(route.model)
    return route, rows, evaluations, models


def close(row: dict) -> dict:
    """Return a row that equals rows with nearly the same figures."""
    return {key: pytest.approx(x, rel=2e-4, abs=2e-5) for key, x in row.items()}


def assert_same(finished, rows, evaluations, every: int) -> None:
    """Check both journals against the second route's rows.

    Before the first step all rewards are 0 up to rounding, so the accuracy of that row is arbitrary
    and is not compared.
    """
    for name, expected, steps in (
        ("metrics.jsonl", rows, [1, 2, 3, 4]),
        ("evaluations.jsonl", list(evaluations.values()), list(range(0, 5, every))),
    ):
        journal = finished.rows(name)
        assert [row.pop("step") for row in journal] == steps
        if name == "metrics.jsonl":
            journal[0] |= {"rewards/accuracies": expected[0]["rewards/accuracies"]}
        for row, expected_row in zip(journal, expected, strict=True):
            assert row == close(expected_row)


@pytest.fixture(scope="module")
def pairs(chain, tmp_path_factory):
    return run_dpo(chain, tmp_path_factory.mktemp("dpo") / "dpo", PAIRS)


@pytest.fixture(scope="module")
def pairs_again(chain, pairs):
    _, training, settings = pairs
    return train_again(chain, settings, training)


class TestPairs:
    def test_the_published_policy(self, pairs, pairs_again):
        published = plain.language_model(pairs[0].folder / "model")
        assert plain.largest_difference(published, pairs_again[0].model) < 1e-5
        assert plain.largest_difference(published, pairs_again[0].reference) > 5e-3

    def test_every_step_and_every_held_out_evaluation(self, pairs, pairs_again):
        _, rows, evaluations, _ = pairs_again
        assert_same(pairs[0], rows, evaluations, every=2)
        assert max(row["grad_norm"] for row in rows) > PAIRS["max_grad_norm"]
        assert evaluations[0]["rewards/margins"] == 0 and abs(evaluations[4]["rewards/margins"]) > 1e-3

    def test_the_manifests_figures_are_the_last_ones(self, pairs, pairs_again):
        last = pairs_again[2][4]
        assert {key: pairs[0].figures[key] for key in last} == close(last)


def test_plackett_luce_with_sft_loss_and_the_best_policy(chain, tmp_path):
    """Weight two losses, and publish the policy of the lowest held-out loss with its figures."""
    finished, training, settings = run_dpo(chain, tmp_path / "dpo", ORDERS)
    _, rows, evaluations, models = train_again(chain, settings, training)
    assert_same(finished, rows, evaluations, every=1)
    best = min(evaluations, key=lambda step: evaluations[step]["loss"])
    assert best not in (0, 4), "choose another learning rate"
    assert finished.figures["best_step"] == best
    assert {key: finished.figures[key] for key in evaluations[best]} == close(evaluations[best])
    published = plain.language_model(finished.folder / "model")
    assert plain.largest_difference(published, models[best]) < 1e-4
    assert plain.largest_difference(published, models[4]) > 1e-2


class TestReference:
    """Test the cache of the reference's log-probabilities, whose keys are the inputs' digests."""

    def run(self, chain, folder, cache, digest="one", choices=PAIRS | {"max_steps": 1}, **inputs):
        """Run the stage with a cache.

        Args:
            chain: The micro chain.
            folder: For the run's files.
            cache: Folder of the cache.
            digest: Digest of the SFT artifact.
            choices: Settings of the section dpo.
            inputs: Folders that replace the chain's `sft` and `rankings`.
        """
        manifests = {"sft": {"digest": digest, "metrics": {}}}
        return run_dpo(chain, folder, choices, cache=cache, inputs=inputs, manifests=manifests)[0]

    @pytest.mark.parametrize("changed", ["sft", "rankings"])
    def test_another_sft_model_or_other_rankings_are_computed_again(self, chain, tmp_path, changed):
        """With an earlier run's cache, the figures are those of a run with an empty cache."""
        if changed == "sft":
            other = {"sft": chain.root / "dpo", "digest": "two"}
        else:  # each prompt's responses in reverse order, with their ranks
            other = {"rankings": tmp_path / "rankings"}
            for name in ("train.jsonl", "validation.jsonl"):
                rows = [row | {key: row[key][::-1] for key in ("responses", "ranks")}
                        for row in chain.rows(f"rankings/{name}")]  # fmt: skip
                write_rows(tmp_path / "rankings" / name, rows)
        self.run(chain, tmp_path / "one", tmp_path / "cache")
        with_cache = self.run(chain, tmp_path / "two", tmp_path / "cache", **other)
        without = self.run(chain, tmp_path / "without", tmp_path / "new", **other)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            assert with_cache.rows(name) == without.rows(name)
        assert with_cache.rows("evaluations.jsonl")[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)

    def test_the_same_reference_is_not_computed_again(self, chain, tmp_path):
        """With other training settings, the cached files stay unchanged and are used."""

        cache = tmp_path / "cache"
        self.run(chain, tmp_path / "one", cache)
        before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
        self.run(chain, tmp_path / "two", cache, choices=PAIRS | {"max_steps": 1, "beta": 0.5})
        assert before == {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
        assert (
            len(before) == 2 + 2 * 3
        )  # of both files: log-probabilities; encoded rankings, their index, their digests
