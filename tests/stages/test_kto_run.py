"""Test dpo with the loss kto against a second computation, from rankings to the published folder.

The second route uses transformers only, one response at a time. It takes from the run only which
prompts each batch holds.
"""

import json

import pytest
import second_route as plain
import torch
from micro_chain import watch_fit, write_rows

from pipeline.errors import UserError
from stages import dpo

SETTINGS = {
    "loss_type": "kto",
    "max_steps": 6,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "per_device_train_tokens": 90,
    "max_length": 48,
    "lr_scheduler_type": "constant",
    "learning_rate": 5e-3,
    "eval_steps": 6,
    "weight_decay": 0.0,
    "max_grad_norm": 0.4,
    "beta": 0.3,
    "desirable_weight": 3.0,  # so that the policy moves towards its responses in general: a KL above 0
    "undesirable_weight": 0.1,
    "sample_tokens": 0,
}


@pytest.fixture(scope="module")
def rankings(chain, tmp_path_factory):
    """Return rankings of three kinds: one response with a thumb, several labels, and ranks only."""
    folder = tmp_path_factory.mktemp("labelled") / "rankings"
    for name in ("train.jsonl", "validation.jsonl"):
        rows = []
        for i, row in enumerate({row["prompt"]: row for row in chain.rows(f"rankings/{name}")}.values()):
            row = {key: row[key] for key in ("id", "prompt", "responses", "labeler")}
            count = len(row["responses"])
            if i % 3 == 0:
                row |= {"responses": row["responses"][:1], "ranks": [None], "labels": [i % 2 == 0]}
            elif i % 3 == 1:
                labels = [None, False, True, True, False][:count] if count > 2 else [False] * count
                row |= {"ranks": [None] * count, "labels": labels}
            else:
                row["ranks"] = list(range(1, count + 1))
            rows.append(row)
        write_rows(folder / name, rows)
    return folder


def groups_of(chain, rankings, name):
    """Return (prompt, labelled responses, whether each is good) of each row of a file."""
    groups = []
    for line in (rankings / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = [plain.response_ids(chain.tokenizer, text) for text in row["responses"]]
        labels = row.get("labels")
        if labels is None:  # the first is good, and the last is bad
            labels = [True, *[None] * (len(answers) - 2), False]
            assert answers[0] != answers[-1]
        kept = [i for i, label in enumerate(labels) if label is not None]
        prompt = plain.prompt_ids(chain.tokenizer, row["prompt"])
        groups.append((prompt, [answers[i] for i in kept], [labels[i] for i in kept]))
    return groups


class SecondRoute:
    """A policy with its own start as the reference."""

    def __init__(self, chain):
        self.model, self.reference = (plain.language_model(chain.root / "sft/model") for _ in range(2))

    def ratio(self, prompt, response):
        with torch.no_grad():
            ref = plain.token_logps(self.reference, prompt, response).sum()
        return plain.token_logps(self.model, prompt, response).sum() - ref

    def evaluate(self, groups):
        """Return the loss of a batch and its figures."""
        with torch.no_grad():
            gains = [
                self.ratio(prompt, response)
                for at, (prompt, _, _) in enumerate(groups)
                for response in groups[at - 1][1]
            ]
        kl = max(0.0, (sum(gains) / len(gains)).item())
        sides, terms = {True: [], False: []}, []
        for prompt, responses, labels in groups:
            for response, good in zip(responses, labels, strict=True):
                ratio = self.ratio(prompt, response)
                value = torch.sigmoid(0.3 * (ratio - kl if good else kl - ratio))
                terms.append((3.0 if good else 0.1) * (1 - value))
                sides[good].append(0.3 * ratio.item())
        loss = sum(terms) / len(terms)
        means = {good: sum(rewards) / len(rewards) for good, rewards in sides.items()}
        return loss, {
            "loss": loss.item(),
            "kl": kl,
            "rewards/chosen": means[True],
            "rewards/rejected": means[False],
            "rewards/margins": means[True] - means[False],
        }


def test_labels_and_ranks_train_a_policy(chain, rankings, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        trainings = watch_fit(patch, dpo)
        settings = [f"dpo.{key}={x}" for key, x in SETTINGS.items()]
        finished = chain.run("dpo", tmp_path / "dpo", *settings, inputs={"rankings": rankings})
    route, train = SecondRoute(chain), groups_of(chain, rankings, "train.jsonl")
    assert max(map(max, trainings[0].batches)) == len(train) - 1
    optimizer, rows = plain.AdamW(route.model, 0.4), []
    for batch in trainings[0].batches:
        loss, figures = route.evaluate([train[i] for i in batch])
        norm = optimizer.step(plain.gradients_of(loss, route.model), 5e-3)
        rows.append(figures | {"grad_norm": norm})
    for row, expected in zip(finished.rows("metrics.jsonl"), rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert any(row["kl"] > 0 for row in rows)
    assert plain.largest_difference(plain.language_model(finished.folder / "model"), route.model) < 1e-5
    with torch.no_grad():
        _, held = route.evaluate(groups_of(chain, rankings, "validation.jsonl"))
    assert {key: finished.figures[key] for key in held} == pytest.approx(held, rel=1e-3, abs=1e-5)
    good = sum(label for _, _, labels in train for label in labels)
    bad = sum(not label for _, _, labels in train for label in labels)
    assert f"{good} good and {bad} bad responses" in finished.said


REFUSED = [
    (["dpo.loss_type=[kto, sft]"], "dpo.loss_type: kto reads labels of single responses, sft ranks"),
    (["dpo.desirable_weight=2"], "dpo.desirable_weight: has no effect with loss_type sigmoid"),
    (["dpo.loss_type=kto", "dpo.label_smoothing=0.1"], "dpo.label_smoothing: has no effect"),
    (
        ["dpo.loss_type=kto", "dpo.per_device_train_batch_size=1", "dpo.gradient_accumulation_steps=1"],
        "dpo.per_device_train_batch_size: 1 prompt a step",
    ),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_settings_that_cannot_work_are_refused(settings, line, chain):
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        chain.experiment(*settings)
