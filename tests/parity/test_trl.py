"""Compare losses and gradients with trl's trainers, on the same tiny models and ids.

trl takes pairs. A prompt with K responses is all of its C(K, 2) pairs in one batch there, whose
mean is our loss.
"""

import copy
import dataclasses

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import PromptGroup, batch_groups
from stages.models.forward import response_logprobs, response_scores
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import ranking_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

QUESTION, OTHER = "what color is the fox ?", "say hello twice ."
GROUPS = {
    "pairs": [(QUESTION, ["the fox is red .", "red ."], (1, 2)), (OTHER, ["hello", "hello hello ."], (2, 1))],
    "K = 4": [(QUESTION, ["the fox is red .", "red .", "hello", "the fox"], (2, 1, 4, 3))],
}


@pytest.fixture(params=GROUPS)
def groups(request, tokenizer):
    return [
        PromptGroup(encode_prompt(tokenizer, p), [encode_response(tokenizer, r) for r in rs], ranks)
        for p, rs, ranks in GROUPS[request.param]
    ]


def quiet(folder, **options):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": None,
        "per_device_train_batch_size": 2,
        **options,
    }


def pair_examples(groups):
    """Return the rows of trl's collators, one per pair."""
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.responses[pair.winner], "rejected_ids": g.responses[pair.loser]}
        for g in groups
        for pair in g.pairs()
    ]


def assert_same_gradients(one, other):
    """Assert ‖ours − theirs‖ ≤ 1e-5 ‖theirs‖ for every weight."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


def dpo_trainer(tmp_path, tokenizer, policy, reference, **options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(**quiet(tmp_path, beta=0.3, **options)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": QUESTION, "chosen": " red .", "rejected": " hello"}]),
    )


def both_sides(trainer, groups, tokenizer, policy, reference):
    """Return trl's loss on all pairs, with gradients in its model, and the parts of ours."""
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pair_examples(groups)))
    expected.backward()
    batch = batch_groups(groups, tokenizer.pad_token_id)
    mask = batch.rows.response_mask
    with torch.no_grad():
        ref_logps = sequence_logps(response_logprobs(reference, batch.rows), mask)
    return expected, batch, sequence_logps(response_logprobs(policy, batch.rows), mask), ref_logps


@pytest.mark.parametrize("loss_type, smoothing", [("sigmoid", 0.0), ("hinge", 0.0), ("robust", 0.1)])
def test_dpo_is_trls(tmp_path, tokenizer, llama, groups, loss_type, smoothing):
    """Loss, gradient of every weight, and the figures under trl's names (its sigmoid has no
    smoothing).
    """
    from transformers import AutoModelForCausalLM

    from stages.dpo import loss_of, pair_figures
    from stages.training.readings import read_sums

    policy, reference = llama(AutoModelForCausalLM, 0), llama(AutoModelForCausalLM, 1)
    theirs = copy.deepcopy(policy)
    trainer = dpo_trainer(tmp_path, tokenizer, theirs, reference, loss_type=[loss_type], label_smoothing=smoothing)
    expected, batch, logps, ref_logps = both_sides(trainer, groups, tokenizer, policy, reference)
    loss = loss_of(loss_type, logps, ref_logps, batch, 0.3, smoothing, len(groups), 1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, theirs)
    figures, _ = read_sums([pair_figures(loss, logps.detach(), ref_logps, batch, 0.3, 1.0)])
    told = {k: v[-1] for mode in trainer._metrics.values() for k, v in mode.items()}
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ):
        assert figures[name] == pytest.approx(told[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("groups", ["pairs"], indirect=True)
@pytest.mark.parametrize("case", ["ipo", "sft"])
def test_dpos_other_losses_are_trls(tmp_path, tokenizer, llama, groups, case):
    """ipo: trl divides a log-ratio by its response's length L, so with all of one length its loss
    at β is ours at β / L over L². sft: a weight on the responses ranked first.
    """
    from transformers import AutoModelForCausalLM

    from stages.dpo import loss_of

    policy, reference = llama(AutoModelForCausalLM, 0), llama(AutoModelForCausalLM, 1)
    theirs = copy.deepcopy(policy)
    if case == "ipo":
        length = 3
        groups = [dataclasses.replace(g, responses=[(3 * r)[:length] for r in g.responses]) for g in groups]
        options, parts = {"loss_type": ["ipo"]}, {"ipo": (0.3 / length, length**-2)}
    else:
        options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.25]}
        parts = {"sigmoid": (0.3, 1.0), "sft": (0.3, 0.25)}
    trainer = dpo_trainer(tmp_path, tokenizer, theirs, reference, **options)
    expected, batch, logps, ref_logps = both_sides(trainer, groups, tokenizer, policy, reference)
    tokens = sum(weight * len(g.responses[i]) for g in groups for i, weight in g.first())
    loss = sum(
        weight * loss_of(name, logps, ref_logps, batch, beta, 0.0, len(groups), tokens)
        for name, (beta, weight) in parts.items()
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(policy, theirs)


@pytest.mark.parametrize("margin", [None, 0.7])
def test_the_ranking_loss_is_trls_reward_loss_over_all_pairs(tmp_path, tokenizer, llama, groups, margin):
    """Compare loss, all gradients, accuracy and margin; K forward passes against K(K − 1)."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model = llama(AutoModelForSequenceClassification, 0, num_labels=1)
    theirs = copy.deepcopy(model)
    trainer = RewardTrainer(
        model=theirs,
        args=RewardConfig(**quiet(tmp_path)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": QUESTION, "chosen": " red .", "rejected": " hello"}]),
    )
    pairs = [
        {"chosen_ids": e["prompt_ids"] + e["chosen_ids"], "rejected_ids": e["prompt_ids"] + e["rejected_ids"]}
        | ({} if margin is None else {"margin": margin})
        for e in pair_examples(groups)
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    expected.backward()

    batch = batch_groups(groups, tokenizer.pad_token_id)
    scores = response_scores(model, batch.rows)
    loss = ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, len(groups), margin or 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(model, theirs)
    told = {k: v[-1] for mode in trainer._metrics.values() for k, v in mode.items()}
    margins = (scores[batch.winners] - scores[batch.losers]).detach()
    assert (margins > 0).float().mean().item() == pytest.approx(told["accuracy"])
    assert margins.mean().item() == pytest.approx(told["margin"], rel=1e-3, abs=1e-5)
