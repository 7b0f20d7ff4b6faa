"""Compare learning rates, weight decay and log-probabilities with transformers' own."""

import pytest
import torch

from data.groups import make_rows
from stages.models.forward import response_logprobs
from stages.training.schedule import learning_rate_at
from stages.training.trainee import make_trainee


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine_with_min_lr", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_after_the_warm_up_are_transformers(ours, theirs, options, warmup):
    """Step n here is call n − 1 there. During warm-up ours is one step ahead: transformers'
    first step has a rate of 0.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, warmup, 20, scheduler_specific_kwargs=options)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[warmup:] == pytest.approx([learning_rate_at(n, 20, 0.3, ours, warmup) for n in range(warmup + 1, 21)])
    assert rates[1 : warmup + 1] == pytest.approx(
        [learning_rate_at(n, 20, 0.3, ours, warmup) for n in range(1, warmup + 1)]
    )


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_what_decays_is_what_decays_in_transformers(llama, tmp_path, adapter):
    """rm and dpo group their weights as transformers does for base and sft."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from stages.models.adapters import AdapterSettings, with_adapter

    model = llama(AutoModelForCausalLM, 0, attention_bias=True)
    model = with_adapter(model, AdapterSettings(method=adapter, **{} if adapter is None else {"r": 2}))
    ours = make_trainee("model", model, learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.1).optimizer
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1)
    theirs = Trainer(model=model, args=args).create_optimizer()
    told = [
        [(group["weight_decay"], list(map(id, group["params"]))) for group in x.param_groups] for x in (ours, theirs)
    ]
    assert told[0] == told[1] and [len(ids) > 0 for _, ids in told[0]] == [True, adapter is None]


def test_response_log_probs_are_minus_transformers_loss(llama):
    """Labels −100 on the prompt: the model's own loss is the mean of −log p over the response."""
    from transformers import AutoModelForCausalLM

    model, prompt, response = llama(AutoModelForCausalLM, 0), [5, 9, 12], [14, 7, 30, 1]
    loss = model(input_ids=torch.tensor([prompt + response]), labels=torch.tensor([[-100] * 3 + response])).loss
    logprobs = response_logprobs(model, make_rows([prompt, [8]], [response, [4]], pad_id=0))
    assert -logprobs[0].mean().item() == pytest.approx(loss.item(), rel=1e-5)
