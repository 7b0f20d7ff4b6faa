"""Compare KTO's loss, gradients and figures with trl's KTOTrainer, on the same tiny models and ids.

trl takes single responses. With one response a prompt, and a micro-batch of trl's as our batch,
both estimate the KL from the same mismatched pairs.
"""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import PromptGroup, batch_groups
from data.labels import LabelledGroups
from stages.models.forward import response_logprobs
from stages.objectives.logprobs import sequence_logps
from stages.settings.dpo import DPOSettings
from stages.training.batching import GroupBatches
from stages.training.kto import KTO, count_marks
from stages.training.readings import read_sums
from stages.training.reference import Reference

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ROWS = [
    ("what color is the fox ?", "the fox is red .", True),
    ("say hello twice .", "hello", False),
    ("say hello .", "hello .", True),
    ("what is red ?", "the fox is red . the fox is red .", True),
]
WEIGHTS = {"desirable_weight": 0.8, "undesirable_weight": 1.3}


class Kept:
    """A cache that keeps nothing."""

    def recall(self, name, digest):
        return None

    def remember(self, name, digest, tensors): ...


class Quiet:
    """A tracker that shows nothing."""

    def progress(self, total, name):
        return nullcontext(SimpleNamespace(update=lambda done: None))


def groups_of(tokenizer, rows):
    return [
        PromptGroup(encode_prompt(tokenizer, p), [encode_response(tokenizer, r)], (None,), labels=((good,),))
        for p, r, good in rows
    ]


def ours(policy, reference, groups, tokenizer, size, **options):
    """Return our loss, figures and estimate in micro-batches of `size`; gradients in the policy."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    runtime = SimpleNamespace(accelerator=accelerator, packed=False)
    config = DPOSettings(loss_type=["kto"], beta=0.3, **options)
    groups = LabelledGroups(groups)

    def cut(some):
        return GroupBatches(some, size=size, budget=None, packed=False)

    pad = tokenizer.pad_token_id
    frozen = Reference(reference, pad, runtime, Kept(), [], Quiet(), lambda: None)
    ref_logps = frozen.logps("train", cut(groups))
    kto = KTO(config, policy, pad, runtime, cut)
    batch = range(len(groups))
    kto.estimator(frozen, "train", groups, [batch])(batch)
    whole, parts, loss = count_marks(groups), [], 0.0
    for rows in cut(groups).to_train(list(batch)):
        members = [groups[i] for i in rows]
        laid = batch_groups(members, pad)
        logps = sequence_logps(response_logprobs(policy, laid.rows), laid.rows.response_mask)
        value, sums = kto.share(members, logps, torch.cat([ref_logps[i] for i in rows]), whole)
        value.backward()
        loss += value.item()
        parts.append(sums)
    return loss, read_sums(parts)[0], kto.kl


@pytest.fixture
def models(llama):
    from transformers import AutoModelForCausalLM

    def make():
        policy = llama(AutoModelForCausalLM, 0)
        reference = copy.deepcopy(policy)
        with torch.no_grad():  # a policy that has moved
            generator = torch.Generator().manual_seed(0)
            for weight in policy.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        return policy, reference

    return make


@pytest.mark.parametrize("swapped", [False, True], ids=["clamped", "above 0"])
def test_kto_is_trls(tmp_path, tokenizer, models, swapped):
    """Loss, gradient of every weight and figures, with a KL above 0 and one that is clamped."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference = models()
    if swapped:
        policy, reference = reference, policy
    theirs = copy.deepcopy(policy)
    trainer = KTOTrainer(
        model=theirs,
        ref_model=reference,
        args=KTOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=4,
            beta=0.3,
            **WEIGHTS,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": p, "completion": " " + r, "label": good} for p, r, good in ROWS]),
    )
    groups = groups_of(tokenizer, ROWS)
    answers = [g.responses[0] for g in groups]
    rows = [
        {"prompt_ids": g.prompt, "completion_ids": own, "KL_completion_ids": other, "label": g.labels[0][0]}
        for g, own, other in zip(groups, answers, answers[-1:] + answers[:-1], strict=True)
    ]
    expected = trainer.compute_loss(theirs, trainer.data_collator(rows))
    expected.backward()
    told = {name: values[-1] for mode in trainer._metrics.values() for name, values in mode.items()}

    loss, figures, kl = ours(policy, reference, groups, tokenizer, 4, **WEIGHTS)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert (kl > 0) is swapped
    assert kl == pytest.approx(told["kl"], rel=1e-5, abs=1e-6)
    for (name, one), other in zip(policy.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name
    for name in figures.keys() - {"loss"}:
        assert figures[name] == pytest.approx(told[name], rel=1e-4, abs=1e-5), name
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"} < set(figures)


def test_neither_estimate_nor_gradient_depends_on_the_micro_batch(tokenizer, models):
    found = []
    for size in (4, 1, 3):
        policy, reference = models()
        found.append((*ours(policy, reference, groups_of(tokenizer, ROWS), tokenizer, size), policy))
    for loss, figures, kl, policy in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6) and kl == pytest.approx(found[0][2], rel=1e-5)
        assert figures == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
        for one, other in zip(policy.parameters(), found[0][3].parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
