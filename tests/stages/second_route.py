"""The other way to each number: transformers as it comes, a row at a time and unpadded, and the formulas written out.

Nothing of the stages, the objectives or the engine is used here.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


def language_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def scalar_model(folder: Path):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def response_ids(tokenizer, text: str, finished: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * finished


def token_logps(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """(R,): log-probability of each token of the response under softmax(logits / temperature)."""
    return distributions(model, prompt, response, temperature)[torch.arange(len(response)), torch.tensor(response)]


def distributions(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """(R, V): log-probabilities of every token before each token of the response."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def score(model, prompt: list[int], response: list[int]) -> Tensor:
    """The score of a whole response, the bias subtracted."""
    return model(torch.tensor([prompt + response])).logits[0, 0] - model.config.reward_bias


def values(model, prompt: list[int], response: list[int]) -> Tensor:
    """(R,): the value of what stands before each token of the response, the bias subtracted."""
    hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
    return hidden @ model.score.weight[0] - model.config.reward_bias


def greedy(model, prompt: list[int], length: int, eos: int) -> list[int]:
    """The likeliest continuation, token by token."""
    response: list[int] = []
    with torch.no_grad():
        while len(response) < length and (not response or response[-1] != eos):
            response.append(int(model(torch.tensor([prompt + response])).logits[0, -1].argmax()))
    return response


def packed_rows(tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Texts, each ended by EOS, end to end in rows of `length` ids; what is left over makes no row."""
    stream = [i for text in texts for i in response_ids(tokenizer, text)]
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


def place(key: str) -> float:
    """Where in [0, 1) the hash of a key lies: what lies below a fraction is held out."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def prompt_place(prompt: str) -> float:
    return place(json.dumps([["user", " ".join(prompt.split())]], ensure_ascii=False))


@dataclass
class Group:
    """A prompt and its K responses as ids, and what each labeler made of them: ranks, and a margin for all pairs."""

    prompt: list[int]
    responses: list[list[int]]
    labelers: list[str]
    ranks: list[list[int | None]]
    margins: list[float]

    def pairs(self) -> list[tuple[int, int, int]]:
        """(winner, loser, labeler) of every two different responses that a labeler judged and did not tie."""
        K = range(len(self.responses))
        return [
            (i, j, who)
            for who, ranks in enumerate(self.ranks)
            for i in K
            for j in K
            if None not in (ranks[i], ranks[j]) and ranks[i] < ranks[j] and self.responses[i] != self.responses[j]
        ]

    def judged(self, who: int) -> int:
        """How many responses the labeler ranked."""
        return sum(rank is not None for rank in self.ranks[who])


def groups_of(tokenizer, rows: list[dict]) -> list[Group]:
    """Rows of a rankings file: several labelers' rows of one prompt are one group."""
    found: dict[str, Group] = {}
    for row in rows:
        responses = [response_ids(tokenizer, text) for text in row["responses"]]
        group = found.setdefault(row["prompt"], Group(prompt_ids(tokenizer, row["prompt"]), responses, [], [], []))
        group.labelers.append(row["labeler"])
        group.ranks.append(row["ranks"])
        group.margins.append(row.get("margin") or 0.0)
    return list(found.values())


def pairwise_loss(group: Group, utilities: Tensor, label_smoothing: float = 0.0, margin_coef: float = 0.0) -> Tensor:
    """Mean over labelers of 1/C(K, 2) Σ over a labeler's pairs of −log σ(difference of utilities): eq. 1."""
    total, flipped = torch.zeros(()), label_smoothing
    for i, j, who in group.pairs():
        gap = utilities[i] - utilities[j] - margin_coef * group.margins[who]
        loss = -(1 - flipped) * gap.sigmoid().log() - flipped * (-gap).sigmoid().log()
        total = total + loss / math.comb(group.judged(who), 2) / len(group.ranks)
    return total


def order_loss(group: Group, utilities: Tensor) -> Tensor:
    """Mean over labelers of 1/(K − 1) Σ over choices of −log of the chosen one's share of e^utility, among it and those
    that the labeler put below it: Plackett–Luce."""
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
    """AdamW, β = (0.9, 0.95), ε = 1e-8, of all parameters of a model, the norm clipped before; norms do not decay."""

    def __init__(self, model, max_grad_norm: float, weight_decay: float = 0.0):
        self.model, self.max_grad_norm, self.steps = model, max_grad_norm, 0
        self.decays = [0.0 if "norm" in name else weight_decay for name, _ in model.named_parameters()]
        self.first = [torch.zeros_like(p) for p in model.parameters()]
        self.second = [torch.zeros_like(p) for p in model.parameters()]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float) -> float:
        """One step down `gradients`; return their norm before it was clipped."""
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
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def norm_of(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())


@torch.no_grad()
def largest_difference(one, other) -> float:
    """Over all weights of two models."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
