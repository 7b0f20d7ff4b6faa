"""Check the stage dpo against a second computation with plain transformers.

It takes one response at a time, with the pairs written out. From the run it takes only the
prompts of each batch.
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
SHARES = [0.5, 1.0, 1.0, 0.55]  # of the peak rate: a warm-up of two steps, then a cosine to a tenth
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
    """A policy that trains on groups, with its untrained self as reference."""

    def __init__(self, chain, settings, sft="sft/model"):
        self.settings = settings
        self.model = plain.language_model(chain.root / sft)
        self.reference = copy.deepcopy(self.model)
        self.optimizer = plain.AdamW(self.model, settings.max_grad_norm, settings.weight_decay)

    def logps(self, model, group) -> torch.Tensor:
        """Return log π of each response with its EOS, (K,)."""
        return torch.stack([plain.token_logps(model, group.prompt, response).sum() for response in group.responses])

    def look(self, groups: list) -> tuple[torch.Tensor, dict]:
        """Return loss and figures of a batch; all prompts weigh the same, whatever K."""
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
        parts = {name: sum(some) / (tokens if name == "sft" else len(groups)) for name, some in parts.items()}
        loss = sum(weight * parts[name] for name, weight in c.losses().items())
        mean = lambda f: statistics.mean(statistics.mean(map(f, some)) for some in pairs)  # noqa: E731
        figures = {
            "loss": loss.item(),
            "rewards/chosen": mean(lambda pair: pair[0]),
            "rewards/rejected": mean(lambda pair: pair[1]),
            "rewards/margins": mean(lambda pair: pair[0] - pair[1]),
            "rewards/accuracies": mean(lambda pair: pair[0] > pair[1]),
            "logps/chosen": mean(lambda pair: pair[2]),
            "logps/rejected": mean(lambda pair: pair[3]),
        }
        return loss, figures | ({f"loss/{name}": x.item() for name, x in parts.items()} if len(parts) > 1 else {})

    def step(self, groups: list, rate: float) -> dict[str, float]:
        """Take a step and return its row of metrics.jsonl."""
        loss, figures = self.look(groups)
        norm = self.optimizer.step(plain.gradients_of(loss, self.model), rate)
        return figures | {"grad_norm": norm, "lr": rate}


def first_by(group) -> dict[int, float]:
    """Return the responses that were put first; tied ones share their labeler's weight."""
    found: dict[int, float] = {}
    for ranks in group.ranks:
        best = min(rank for rank in ranks if rank is not None)
        for i in (first := [i for i, rank in enumerate(ranks) if rank == best]):
            found[i] = found.get(i, 0.0) + 1 / len(first) / len(group.ranks)
    return found


def run_dpo(chain, folder, choices, **options):
    """Return the finished run, its training and its settings."""
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, dpo)
        settings = [f"dpo.{key}={x}" for key, x in choices.items()]
        finished = chain.run("dpo", folder, *settings, **options)
    return finished, trainings[0], chain.experiment(*settings).dpo


def train_again(chain, settings, training):
    """Return the second computation, its rows of both journals, and the model after each step."""
    train, held = (plain.groups_of(chain.tokenizer, chain.rows(f"rankings/{x}.jsonl")) for x in ("train", "validation"))
    route = SecondRoute(chain, settings)
    rows, looks, models = [], {}, {}
    for step, share in enumerate([0.0, *SHARES]):
        if step:
            batch = [train[i] for i in training.batches[step - 1]]
            rows.append(route.step(batch, share * settings.learning_rate))
        if step % settings.eval_steps == 0:
            with torch.no_grad():
                looks[step], models[step] = route.look(held)[1], copy.deepcopy(route.model)
    return route, rows, looks, models


def close(row: dict) -> dict:
    return {key: pytest.approx(x, rel=2e-4, abs=2e-5) for key, x in row.items()}


def assert_same(finished, rows, looks, every: int) -> None:
    """Both journals equal the second computation's.

    Before the first step all rewards are 0 up to rounding, so the first accuracy is left out.
    """
    for name, expected, steps in (
        ("metrics.jsonl", rows, [1, 2, 3, 4]),
        ("evaluations.jsonl", list(looks.values()), list(range(0, 5, every))),
    ):
        found = finished.rows(name)
        assert [row.pop("step") for row in found] == steps
        if name == "metrics.jsonl":
            found[0] |= {"rewards/accuracies": expected[0]["rewards/accuracies"]}
        for row, again in zip(found, expected, strict=True):
            assert row == close(again)


@pytest.fixture(scope="module")
def pairs(chain, tmp_path_factory):
    return run_dpo(chain, tmp_path_factory.mktemp("dpo") / "dpo", PAIRS)


@pytest.fixture(scope="module")
def pairs_again(chain, pairs):
    _, training, settings = pairs
    return train_again(chain, settings, training)


class TestPairs:
    def test_the_published_policy(self, pairs, pairs_again):
        found = plain.language_model(pairs[0].folder / "model")
        assert plain.largest_difference(found, pairs_again[0].model) < 1e-5
        assert plain.largest_difference(found, pairs_again[0].reference) > 5e-3

    def test_every_step_and_every_look_at_validation_jsonl(self, pairs, pairs_again):
        _, rows, looks, _ = pairs_again
        assert_same(pairs[0], rows, looks, every=2)
        assert max(row["grad_norm"] for row in rows) > PAIRS["max_grad_norm"]
        assert looks[0]["rewards/margins"] == 0 and abs(looks[4]["rewards/margins"]) > 1e-3

    def test_the_manifests_figures_are_the_last_ones(self, pairs, pairs_again):
        last = pairs_again[2][4]
        assert {key: pairs[0].figures[key] for key in last} == close(last)


def test_whole_orders_with_the_first_responses_likelihood_and_the_best_policy(chain, tmp_path):
    """With two weighted losses, the policy of the lowest held-out loss is published."""
    finished, training, settings = run_dpo(chain, tmp_path / "dpo", ORDERS)
    _, rows, looks, models = train_again(chain, settings, training)
    assert_same(finished, rows, looks, every=1)
    best = min(looks, key=lambda step: looks[step]["loss"])
    assert best not in (0, 4), "take another rate"
    assert finished.figures["best_step"] == best
    assert {key: finished.figures[key] for key in looks[best]} == close(looks[best])
    found = plain.language_model(finished.folder / "model")
    assert plain.largest_difference(found, models[best]) < 1e-4 < 1e-2 < plain.largest_difference(found, models[4])


class TestReference:
    """Log-probabilities are kept beside the stage, under a digest of what they depend on."""

    def run(self, chain, folder, cache, digest="one", choices=PAIRS | {"max_steps": 1}, **inputs):
        """Run dpo with other folders in place of the chain's `sft` and `rankings`."""
        manifests = {"sft": {"digest": digest, "metrics": {}}}
        return run_dpo(chain, folder, choices, cache=cache, inputs=inputs, manifests=manifests)[0]

    @pytest.mark.parametrize("changed", ["sft", "rankings"])
    def test_another_sft_model_or_other_rankings_get_their_own(self, chain, tmp_path, changed):
        """With results of an earlier run on disk, figures equal those of a run without."""
        if changed == "sft":
            other = {"sft": chain.root / "dpo", "digest": "two"}
        else:  # each prompt's responses the other way round, with the ranks that they had
            other = {"rankings": tmp_path / "rankings"}
            for name in ("train.jsonl", "validation.jsonl"):
                rows = [row | {key: row[key][::-1] for key in ("responses", "ranks")}
                        for row in chain.rows(f"rankings/{name}")]  # fmt: skip
                write_rows(tmp_path / "rankings" / name, rows)
        self.run(chain, tmp_path / "one", tmp_path / "cache")
        beside = self.run(chain, tmp_path / "two", tmp_path / "cache", **other)
        alone = self.run(chain, tmp_path / "alone", tmp_path / "new", **other)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            assert beside.rows(name) == alone.rows(name)
        assert beside.rows("evaluations.jsonl")[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)

    def test_the_same_one_computes_nothing_again(self, chain, tmp_path):
        """Where only training settings differ, what is kept is used."""
        cache = tmp_path / "cache"
        self.run(chain, tmp_path / "one", cache)
        before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
        self.run(chain, tmp_path / "two", cache, choices=PAIRS | {"max_steps": 1, "beta": 0.5})
        assert before == {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} and len(before) == 2
