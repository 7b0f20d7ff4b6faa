"""What one PPO iteration knows of its episodes."""

from dataclasses import dataclass

from torch import Tensor

from data.groups import Rows


@dataclass(frozen=True)
class Rollout:
    """B episodes, frozen. Example: prompt "what color is the fox ?", response "red . <end>", R = 3.

    rows: prompt and response ids, masks; response_mask (B, R) is True for "red", "." and "<end>".
    logprobs (B, R): log π_old(y_t | x, y_<t), by the forward that the update uses.
    ref_logprobs (B, R): the same under the SFT reference; values (B, R): V before each token.
    scores (B,): the reward model at the last token, bias subtracted, unfinished responses already replaced.
    finished (B,): True where the response ends with EOS.
    """

    rows: Rows
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor
    finished: Tensor
