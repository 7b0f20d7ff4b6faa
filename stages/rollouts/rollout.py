"""What one PPO iteration knows of its episodes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from data.groups import Rows, make_rows


@dataclass(frozen=True)
class Rollout:
    """B episodes, frozen. Example: prompt "what color is the fox ?", response "red . <end>", R = 3.

    prompts, responses: B lists of ids, EOS included where the response has one; prompt_ids: B rows of the prompt file.
    mask (B, R): True for "red", "." and "<end>".
    logprobs (B, R): log π_old(y_t | x, y_<t); ref_logprobs (B, R): the same under the reference.
    values (B, R): V before each token; entropy (B, R): of π_old before each token.
    scores (B,): what the reward model gives at the last token, bias subtracted; unfinished responses and the settings
    for clipping and length already seen to. finished (B,): True where the response ends with EOS.
    engine_kl: KL(what was sampled from ‖ π_old), in nats a token; 0 where the sampler's log-probs are taken.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    prompt_ids: list[int]
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor
    finished: Tensor
    engine_kl: float = 0.0

    def rows(self, index: Sequence[int], pad_id: int, packed: bool) -> Rows:
        """The episodes of `index`, laid out for a forward pass on the rollout's device."""
        chosen = [self.prompts[i] for i in index], [self.responses[i] for i in index]
        return make_rows(*chosen, pad_id, packed=packed).to(self.mask.device)

    def lengths(self) -> list[int]:
        """Tokens of each episode, prompt and response."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]
