"""Compute the numbers of the stages a second time, with unpadded rows and written-out formulas.

Models are loaded with transformers only; nothing of the stages or the objectives is used here.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def language_model(folder: Path):
    """Load a causal language model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scalar_model(folder: Path):
    """Load a reward or value model in float32."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt in the chat template, with the generation prompt."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def response_ids(tokenizer, text: str, finished: bool = True) -> list[int]:
    """Return the ids of a response, with EOS if it is finished."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if finished else ids


def token_logps(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Return (R,): log-probabilities of the response tokens under softmax(logits / temperature)."""
    return distributions(model, prompt, response, temperature)[torch.arange(len(response)), torch.tensor(response)]


def distributions(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Return (R, V): log-probabilities of the whole vocabulary at each token of the response."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def score(model, prompt: list[int], response: list[int]) -> Tensor:
    """Return the score of a whole response minus the bias."""
    return model(torch.tensor([prompt + response])).logits[0, 0] - model.config.reward_bias


def values(model, prompt: list[int], response: list[int]) -> Tensor:
    """Return (R,): the value of the context before each response token, minus the bias."""
    hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
    return hidden @ model.score.weight[0] - model.config.reward_bias


def greedy(model, prompt: list[int], length: int, eos: int) -> list[int]:
    """Return the greedy continuation of a prompt, with EOS if it ends within `length` tokens."""
    response: list[int] = []
    with torch.no_grad():
        while len(response) < length and (not response or response[-1] != eos):
            response.append(int(model(torch.tensor([prompt + response])).logits[0, -1].argmax()))
    return response


def packed_rows(tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Join texts, each with EOS, and cut them into rows of `length` ids; drop the remainder."""
    stream = [i for text in texts for i in response_ids(tokenizer, text)]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def hash_fraction(key: str) -> float:
    """Return the hash of a key as a number in [0, 1).

    Keys below the validation fraction are held out.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def prompt_hash_fraction(prompt: str) -> float:
    """Return the hash of a prompt, without regard to white space, as a number in [0, 1)."""
    return hash_fraction(json.dumps([["user", " ".join(prompt.split())]], ensure_ascii=False))


@dataclass
class Group:
    """A prompt with its K responses and their rankings."""

    prompt: list[int]
    """The prompt's ids."""
    responses: list[list[int]]
    """The ids of each response."""
    labelers: list[str]
    """The labelers' names."""
    ranks: list[list[int | None]]
    """Each labeler's ranks of the K responses; None for a response that was not judged."""
    margins: list[float]
    """Each labeler's margin, which holds for all pairs."""

    def pairs(self) -> list[tuple[int, int, int]]:
        """Return (winner, loser, labeler) of all pairs of different responses without a tie."""
        K = range(len(self.responses))
        return [
            (i, j, who)
            for who, ranks in enumerate(self.ranks)
            for i in K
            for j in K
            if None not in (ranks[i], ranks[j]) and ranks[i] < ranks[j] and self.responses[i] != self.responses[j]
        ]

    def judged(self, who: int) -> int:
        """Return the number of responses that the labeler ranked."""
        return sum(rank is not None for rank in self.ranks[who])


def groups_of(tokenizer, rows: list[dict]) -> list[Group]:
    """Group the rows of a rankings file by prompt."""
    groups: dict[str, Group] = {}
    for row in rows:
        responses = [response_ids(tokenizer, text) for text in row["responses"]]
        group = groups.setdefault(row["prompt"], Group(prompt_ids(tokenizer, row["prompt"]), responses, [], [], []))
        group.labelers.append(row["labeler"])
        group.ranks.append(row["ranks"])
        group.margins.append(row.get("margin") or 0.0)
    return list(groups.values())


def pairwise_loss(group: Group, utilities: Tensor, label_smoothing: float = 0.0, margin_coef: float = 0.0) -> Tensor:
    """Return the K-wise pair loss (InstructGPT, eq. 1) of a group.

    It is the mean over labelers of 1/C(K, 2) Σ −log σ(utility difference) over the labeler's pairs.

    Args:
        group: A prompt with its rankings.
        utilities: (K,) a score for each response.
        label_smoothing: Probability that a pair is labeled the wrong way round.
        margin_coef: Factor of the labelers' margins, which are subtracted from the differences.
    """
    total, flipped = torch.zeros(()), label_smoothing
    for i, j, who in group.pairs():
        gap = utilities[i] - utilities[j] - margin_coef * group.margins[who]
        loss = -(1 - flipped) * gap.sigmoid().log() - flipped * (-gap).sigmoid().log()
        total = total + loss / math.comb(group.judged(who), 2) / len(group.ranks)
    return total


def order_loss(group: Group, utilities: Tensor) -> Tensor:
    """Return the Plackett–Luce loss of a group.

    It is the mean over labelers of 1/(K − 1) Σ −log p(choice), where p is the chosen response's
    share of e^utility among itself and the responses that the labeler ranked below it.
    """
    total = torch.zeros(())
    for who in range(len(group.ranks)):
        below: dict[int, list[int]] = {}
        for i, j, labeler in group.pairs():
            if labeler == who:
                below.setdefault(i, []).append(j)
        for i, losers in below.items():
            share = utilities[i].exp() / (utilities[i].exp() + sum(utilities[j].exp() for j in losers))
            total = total - share.log() / (group.judged(who) - 1) / len(group.ranks)
    return total


class AdamW:
    """Optimize a model by AdamW with β = (0.9, 0.95), ε = 1e-8 and clipped gradients.

    The weights of normalization layers do not decay.
    """

    def __init__(self, model, max_grad_norm: float, weight_decay: float = 0.0):
        """Start with zero moments."""
        self.model, self.max_grad_norm, self.steps = model, max_grad_norm, 0
        self.decays = [0.0 if "norm" in name else weight_decay for name, _ in model.named_parameters()]
        self.first = [torch.zeros_like(p) for p in model.parameters()]
        self.second = [torch.zeros_like(p) for p in model.parameters()]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float) -> float:
        """Take a step and return the norm of the gradients before clipping."""
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        scale = min(1.0, self.max_grad_norm / (norm + 1e-6))
        self.steps += 1
        moments = zip(self.model.parameters(), self.decays, gradients, self.first, self.second, strict=True)
        for p, decay, g, m, v in moments:
            p *= 1 - rate * decay
            m.mul_(0.9).add_(0.1 * scale * g)
            v.mul_(0.95).add_(0.05 * (scale * g) ** 2)
            p -= rate * (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.95**self.steps)).sqrt() + 1e-8)
        return norm


def gradients_of(loss: Tensor, model) -> list[Tensor]:
    """Return the gradient for each parameter of a model; zeros where there is none."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]


def norm_of(gradients: list[Tensor]) -> float:
    """Return the norm of all gradients together."""
    return float(torch.cat([g.flatten() for g in gradients]).norm())


@torch.no_grad()
def largest_difference(one, other) -> float:
    """Return the largest absolute difference between the weights of two models."""

    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
