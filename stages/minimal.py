"""Train the whole chain in one file: base model, SFT, reward model, then PPO-ptx or DPO.

    python -m stages.minimal        about three minutes on one core, on the embedded world

Losses and gradients are those of the real stages; tests/stages/test_minimal.py compares them. What
the real stages add is left out here: resume, held-out evaluation, several processes, packing,
adapters, your own data.

Papers: InstructGPT (Ouyang 2022), PPO (Schulman 2017), GAE (Schulman 2016), DPO (Rafailov 2023).
Shapes: B responses, N pairs of them, P prompt tokens, R response tokens, T = P + R tokens of a row,
V vocabulary, d hidden size.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.documents import wrap_documents
from data.encode import decode_response, encode_prompt, encode_response
from data.groups import GroupBatch, PromptGroup, Rows, batch_groups, make_rows
from data.records import Document
from data.streams import Stream
from data.tokenizer import train_tokenizer
from data.world import labelers
from data.world.world import World
from stages.models.loading import from_scratch
from stages.objectives.advantages import gae
from stages.objectives.logprobs import sequence_logps, token_logprobs
from stages.objectives.losses import dpo_loss, language_model_loss, policy_loss, ranking_loss, value_loss
from stages.objectives.masked import masked_whiten
from stages.objectives.rewards import final_scores, kl_per_token, token_rewards

MODEL = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 256}
R = 32  # longest response in tokens, EOS included
K = 6  # responses of a prompt that are ranked (InstructGPT: 4 to 9)
KL_COEF, PTX_COEF = 0.1, 1.0  # β and γ of InstructGPT's eq. 2
CLIPRANGE, LAM = 0.2, 0.95  # ε of PPO's eq. 7, λ of GAE
MISSING_EOS_SCORE = -3.0  # score of a response that was cut off
BETA = 0.5  # β of DPO's eq. 7

# ── Models ───────────────────────────────────────────────────────────────────────────────────────


class ScalarModel(nn.Module):
    """A trunk with a scalar head in place of the unembedding: a reward or a value model."""

    def __init__(self, trunk: nn.Module, head: nn.Linear, bias: float = 0.0) -> None:
        super().__init__()
        self.trunk, self.head, self.bias = trunk, head, bias

    def forward(self, rows: Rows, positions: Tensor) -> Tensor:
        """Return the head's output at `positions`, indices (any shape) into the B·T tokens."""
        hidden = self.trunk(input_ids=rows.input_ids).last_hidden_state.flatten(0, 1)  # (B·T, d)
        return self.head(hidden[positions]).squeeze(-1) - self.bias


def response_scores(model: ScalarModel, rows: Rows) -> Tensor:
    """Return r(x, y), read at the last token of each response, (B,)."""
    return model(rows, rows.last)


def response_values(model: ScalarModel, rows: Rows) -> Tensor:
    """Return V(x, y_<t) before each response token, (B, R); 0 off the mask."""
    mask = rows.response_mask  # (B, R), True at real response tokens
    return torch.where(mask, model(rows, rows.before.where(mask, 0)), 0.0)


def response_logprobs(policy: nn.Module, rows: Rows) -> Tensor:
    """Return log π(y_t | x, y_<t) of each response token, (B, R); 0 off the mask."""
    mask = rows.response_mask
    # Padding is on the right, where causal attention never reaches: no mask is needed.
    logits = policy(input_ids=rows.input_ids).logits.flatten(0, 1)  # (B·T, V)
    before = rows.before.where(mask, 0)  # (B, R), the token whose logits predict each response token
    return torch.where(mask, token_logprobs(logits[before], rows.responses), 0.0)


@torch.no_grad()
def sample(policy: nn.Module, prompts: Sequence[list[int]], tokenizer: Any) -> list[list[int]]:
    """Sample a response to each prompt at temperature 1, to its EOS or cut off after R tokens."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])  # (B, P), padded on the left
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": R, "use_cache": True}
    options |= {"pad_token_id": pad, "eos_token_id": eos}
    responses = policy.generate(ids, attention_mask=(ids != pad).long(), **options)[:, width:].tolist()
    return [y[: y.index(eos) + 1] if eos in y else y for y in responses]


# ── Losses: each is a mean over its batch ────────────────────────────────────────────────────────


def text_loss(policy: nn.Module, rows: Sequence[dict], pad_id: int) -> Tensor:
    """Return −mean log π(token | before) over all labels that are not −100.

    Args:
        policy: The language model.
        rows: {input_ids, labels} of any lengths.
        pad_id: The id that fills rows up.
    """
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [pad_id] * (width - len(row["input_ids"])) for row in rows])  # (B, T)
    labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])[:, 1:]
    logits = policy(input_ids=ids).logits[:, :-1]  # (B, T − 1, V): logits at t predict token t + 1
    return language_model_loss(logits, labels, count=(labels != -100).sum())


def reward_loss(reward_model: ScalarModel, batch: GroupBatch) -> Tensor:
    """Return −1/C(K, 2) Σ_pairs log σ(r(x, y_w) − r(x, y_l)) per prompt (InstructGPT, eq. 1)."""
    scores = response_scores(reward_model, batch.rows)  # (B,): each response is computed once for all its pairs
    return ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, count=batch.groups)


def preference_loss(policy: nn.Module, ref_policy: nn.Module, batch: GroupBatch) -> Tensor:
    """Return −log σ(β log π/π_ref (y_w) − β log π/π_ref (y_l)), averaged as above (DPO, eq. 7)."""
    mask = batch.rows.response_mask
    logps = sequence_logps(response_logprobs(policy, batch.rows), mask)  # (B,)
    with torch.no_grad():
        ref_logps = sequence_logps(response_logprobs(ref_policy, batch.rows), mask)
    return dpo_loss(logps, ref_logps, batch.winners, batch.losers, batch.pair_weights, BETA, count=batch.groups)


@dataclass(frozen=True)
class Episodes:
    """B sampled responses with what PPO's update reads of them."""

    rows: Rows
    """Prompts and responses, padded."""
    logprobs: Tensor
    """log π_old of each response token, (B, R)."""
    values: Tensor
    """V_old before each response token, (B, R)."""
    advantages: Tensor
    """(B, R), whitened over the batch."""
    returns: Tensor
    """What the values should be, (B, R)."""

    def select(self, index: Tensor) -> "Episodes":
        """Return the episodes of `index`, a minibatch."""
        r = self.rows
        prompt_end, first, lengths = (x[index] for x in (r.prompt_end, r.first, r.lengths))
        real = r.response_mask[index].flatten().nonzero().flatten()
        rows = Rows(r.input_ids[index], r.responses[index], lengths, torch.arange(len(index)), prompt_end, first, real)
        tensors = (self.logprobs, self.values, self.advantages, self.returns)
        return Episodes(rows, *(x[index] for x in tensors))


def ppo_losses(policy: nn.Module, value_model: ScalarModel, batch: Episodes) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate (PPO, eq. 7) and the clipped value loss, means over tokens."""
    mask = batch.rows.response_mask
    tokens = mask.sum()
    logprobs, values = response_logprobs(policy, batch.rows), response_values(value_model, batch.rows)
    surrogate, _ = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, CLIPRANGE, tokens)
    value_error, _ = value_loss(values, batch.values, batch.returns, mask, CLIPRANGE, tokens)
    return surrogate, value_error


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW over all weights of the model."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def clip_and_step(optimizer: torch.optim.Optimizer) -> None:
    """Clip the norm of the gradients to 1, take a step and clear them."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def minimize(loss: Callable[[], Tensor], model: nn.Module, steps: int, learning_rate: float) -> None:
    """Step down the loss of a new batch each time: ten steps of warm-up, linear decay to 0."""
    optimizer = optimizer_of(model, learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss().backward()
        clip_and_step(optimizer)


def train_on_text(policy: nn.Module, rows: Sequence[dict], pad_id: int, steps: int, learning_rate: float) -> None:
    """Train base on documents, or SFT on demonstrations (whose labels are completions)."""
    stream = Stream(len(rows), seed=0)  # endless, in a new order each epoch
    minimize(lambda: text_loss(policy, [rows[i] for i in stream.take(32)], pad_id), policy, steps, learning_rate)


def rank(sft: nn.Module, world: World, prompts: Sequence[str], tokenizer: Any) -> list[PromptGroup]:
    """Sample K responses to each prompt and let five simulated labelers rank them."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sampled = []  # K responses of each prompt
    for start in range(0, len(ids), 32):
        responses = sample(sft, [prompt for prompt in ids[start : start + 32] for _ in range(K)], tokenizer)
        sampled += [responses[i : i + K] for i in range(0, len(responses), K)]
    texts = [[decode_response(tokenizer, y) for y in responses] for responses in sampled]
    finished = [[y[-1] == tokenizer.eos_token_id for y in responses] for responses in sampled]
    utilities = [world.labeler_utilities(*row) for row in zip(prompts, texts, finished, strict=True)]  # (5, K) each
    answers = [list(zip(*row, strict=True)) for row in zip(texts, finished, strict=True)]
    noise, generator = labelers.calibrate_noise(utilities, answers), np.random.default_rng(0)
    groups = []
    for prompt, responses, utility, answer in zip(ids, sampled, utilities, answers, strict=True):
        ranks, *more_ranks = [tuple(labelers.rank(u, noise, generator, answer)) for u in utility]
        groups.append(PromptGroup(prompt, responses, ranks, more_ranks=tuple(more_ranks)))
    return groups


def train_reward_model(
    sft: nn.Module, groups: Sequence[PromptGroup], demonstrations: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> ScalarModel:
    """Train SFT's trunk with a new scalar head on all pairs of each prompt (InstructGPT, §3.5)."""
    trunk = copy.deepcopy(sft.base_model)
    head = nn.Linear(trunk.config.hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(trunk.config.hidden_size + 1) ** -0.5)
    model, stream = ScalarModel(trunk, head), Stream(len(groups), seed=1)
    minimize(
        lambda: reward_loss(model, batch_groups([groups[i] for i in stream.take(8)], pad_id)),
        model,
        steps=200,
        learning_rate=5e-4,
    )
    prompts, responses = zip(*demonstrations, strict=True)
    with torch.no_grad():  # the bias makes demonstrations score 0 on average (§3.5)
        model.bias = response_scores(model, make_rows(prompts, responses, pad_id)).mean().item()
    return model


def train_ppo(
    sft: nn.Module, reward_model: ScalarModel, prompts: Sequence[list[int]], documents: Sequence[dict], tokenizer: Any
) -> nn.Module:
    """Maximise E[r(x, y) − β log π/π_SFT] + γ E[log π(x_pretrain)] (InstructGPT, eq. 2)."""
    policy, value_model = copy.deepcopy(sft), copy.deepcopy(reward_model)
    optimizers = optimizer_of(policy, 2e-4), optimizer_of(value_model, 5e-4)
    prompt_stream, text_stream = Stream(len(prompts), seed=2), Stream(len(documents), seed=3)
    for _ in range(40):
        # 1 Prompts.
        asked = [prompts[i] for i in prompt_stream.take(64)]
        # 2 Sample, and ask every model about the samples.
        rows = make_rows(asked, sample(policy, asked, tokenizer), tokenizer.pad_token_id)
        mask = rows.response_mask
        with torch.no_grad():
            logprobs, ref_logprobs = response_logprobs(policy, rows), response_logprobs(sft, rows)  # (B, R) each
            values, scores = response_values(value_model, rows), response_scores(reward_model, rows)  # (B, R), (B,)
        # 3 Reward: the score at the last token, minus β · KL at every token (InstructGPT, eq. 2).
        finished = (rows.responses == tokenizer.eos_token_id).any(-1)  # (B,)
        scores = final_scores(scores, finished, MISSING_EOS_SCORE)
        rewards = token_rewards(scores, kl_per_token(logprobs, ref_logprobs), mask, KL_COEF)  # (B, R)
        # 4 Advantage (GAE, eq. 16).
        advantages, returns = gae(rewards, values, mask, LAM)  # (B, R) each
        episodes = Episodes(rows, logprobs, values, masked_whiten(advantages, mask), returns)
        # 5 Update: a step of the policy (PPO + γ · pretraining) and one of the value model each.
        for index in torch.randperm(len(asked)).split(32):
            surrogate, value_error = ppo_losses(policy, value_model, episodes.select(index))
            ptx_loss = text_loss(policy, [documents[i] for i in text_stream.take(8)], tokenizer.pad_token_id)
            (surrogate + PTX_COEF * ptx_loss).backward()
            value_error.backward()
            for optimizer in optimizers:
                clip_and_step(optimizer)
    return policy


def train_dpo(sft: nn.Module, groups: Sequence[PromptGroup], pad_id: int) -> nn.Module:
    """Train a policy on the rankings directly, without a reward model and without sampling."""
    policy, stream = copy.deepcopy(sft), Stream(len(groups), seed=4)
    minimize(
        lambda: preference_loss(policy, sft, batch_groups([groups[i] for i in stream.take(16)], pad_id)),
        policy,
        steps=50,
        learning_rate=2e-4,
    )
    return policy


def gold_score(policy: nn.Module, world: World, prompts: Sequence[str], tokenizer: Any) -> float:
    """Return the mean gold score, in [0, 1], of one response to each prompt; not for training."""
    responses = sample(policy, [encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer)
    texts = [decode_response(tokenizer, y) for y in responses]
    finished = [y[-1] == tokenizer.eos_token_id for y in responses]
    return float(np.mean([world.gold(*row)["overall"] for row in zip(prompts, texts, finished, strict=True)]))


def main() -> dict[str, float]:
    """Run the chain on the embedded world; print and return the gold score of each policy."""
    torch.manual_seed(0)
    began, scores = time.perf_counter(), {}
    world = World.build(seed=0, documents=15_000, demonstrations=3000, prompts=3000, evaluation_prompts=240)
    documents = [Document(row["text"]) for row in world.documents()]
    prompts, unseen = ([row["prompt"] for row in rows] for rows in (world.prompts(), world.evaluation_prompts()))
    tokenizer = train_tokenizer((document.text for document in documents), vocab_size=1024)
    pad_id = tokenizer.pad_token_id

    def report(name: str, policy: nn.Module) -> None:
        scores[name] = gold_score(policy, world, unseen, tokenizer)
        print(f"{time.perf_counter() - began:4.0f} s   {name:4}   gold {scores[name]:.3f}", flush=True)

    # Base: next-token prediction on documents.
    text = [{"input_ids": ids, "labels": ids} for ids in wrap_documents(tokenizer, documents, length=48)]
    policy = from_scratch(tokenizer, **MODEL, max_position_embeddings=128, attn_implementation="sdpa", seed=0)
    train_on_text(policy, text, pad_id, steps=600, learning_rate=3e-3)
    report("base", policy)
    # SFT: next-token prediction on completions.
    pairs = [(encode_prompt(tokenizer, row["prompt"]), row["completion"]) for row in world.demonstrations()]
    demonstrations = [(prompt, encode_response(tokenizer, completion)) for prompt, completion in pairs]
    rows = [{"input_ids": x + y, "labels": [-100] * len(x) + y} for x, y in demonstrations]
    train_on_text(policy, rows, pad_id, steps=270, learning_rate=1e-3)
    report("sft", policy)
    # Rankings, and the reward model that learns from them.
    groups = rank(policy, world, prompts[:1000], tokenizer)
    reward_model = train_reward_model(policy, groups, demonstrations[:256], pad_id)
    # PPO-ptx climbs the reward model; DPO learns from the rankings themselves.
    asked = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    report("ppo", train_ppo(policy, reward_model, asked, text, tokenizer))
    report("dpo", train_dpo(policy, groups, pad_id))
    return scores


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
