"""Our losses and gradients against trl 1.16's own trainers, on the same tiny models and the same ids.

trl has pairs; a prompt with K responses is all its C(K, 2) pairs in one batch, whose mean is then our loss.
"""

import copy

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import PromptGroup, batch_groups
from stages.models.forward import response_logprobs, response_scores
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import dpo_loss, ranking_loss

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
    """What trl's collators take: one row a pair."""
    return [
        {"prompt_ids": g.prompt, "chosen_ids": g.responses[w], "rejected_ids": g.responses[lo]}
        for g in groups
        for w, lo in g.pairs()
    ]


def assert_same_gradients(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_dpo_is_trls(tmp_path, tokenizer, llama, groups, loss_type):
    """Loss, gradient of every weight, and the figures under trl's names (trl's ipo divides by length, the
    paper's and ours do not)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from stages.dpo import pair_figures

    policy, reference = llama(AutoModelForCausalLM, 0), llama(AutoModelForCausalLM, 1)
    theirs = copy.deepcopy(policy)
    trainer = DPOTrainer(
        model=theirs,
        ref_model=reference,
        args=DPOConfig(**quiet(tmp_path, beta=0.3, loss_type=[loss_type])),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": QUESTION, "chosen": " red .", "rejected": " hello"}]),
    )
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pair_examples(groups)))
    expected.backward()

    batch = batch_groups(groups, tokenizer.pad_token_id)
    mask = batch.rows.response_mask
    with torch.no_grad():
        ref_logps = sequence_logps(response_logprobs(reference, batch.rows), mask)
    logps = sequence_logps(response_logprobs(policy, batch.rows), mask)
    loss = dpo_loss(
        logps, ref_logps, batch.winners, batch.losers, batch.pair_weights, 0.3, len(groups), loss_type
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(policy, theirs)
    figures = pair_figures(loss, logps.detach(), ref_logps, batch, 0.3, 1.0)
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


def test_the_ranking_loss_is_trls_reward_loss_over_all_pairs(tmp_path, tokenizer, llama, groups):
    """Loss, gradient of every weight, accuracy and margin; K forward passes against K(K − 1)."""
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
        for e in pair_examples(groups)
    ]
    expected = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    expected.backward()

    batch = batch_groups(groups, tokenizer.pad_token_id)
    scores = response_scores(model, batch.rows)
    loss = ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, len(groups))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(model, theirs)
    told = {k: v[-1] for mode in trainer._metrics.values() for k, v in mode.items()}
    margins = (scores[batch.winners] - scores[batch.losers]).detach()
    assert (margins > 0).float().mean().item() == pytest.approx(told["accuracy"])
    assert margins.mean().item() == pytest.approx(told["margin"], rel=1e-3, abs=1e-5)
