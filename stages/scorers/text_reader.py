"""Encode conversations and responses again, for a reward model with another tokenizer.

The reward model reads them exactly as it was trained on rankings: the prompt through its own chat
template, then the response, with its own EOS where the response ended by itself.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.encode import encode_prompts, encode_responses
from pipeline.errors import UserError
from stages.models.loading import load_tokenizer
from stages.models.same_tokenizer import difference_of
from stages.settings.checks import context_of


@dataclass(frozen=True)
class TextReader:
    """What a reward model with a tokenizer of its own needs to read texts."""

    tokenizer: Any
    """The reward model's tokenizer, with its chat template."""
    context: int | None
    """The most tokens of a row; None if the model states none."""
    on_too_long: str
    """"error" refuses a longer row; "drop" and "truncate" cut the end of its response, and its EOS,
    as rm does with "truncate": a response that was sampled cannot be left out."""

    def encode(
        self,
        prompts: Sequence[list[dict[str, str]]],
        answers: Sequence[tuple[str, bool]],
        places: Sequence[str] | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of B prompts and of B responses.

        Args:
            prompts: The prompt of each response, as messages.
            answers: (text, whether it ended by itself) of each response.
            places: The location of each prompt, for error lines; None: its beginning is shown.

        Raises:
            UserError: The chat template refuses a prompt, or a row does not fit in the context.
        """
        names = list(places or (f"the prompt {prompt[-1]['content'][:40]!r}" for prompt in prompts))
        keys = [json.dumps(prompt) for prompt in prompts]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # samples of a prompt share it
        asked = list(first.values())
        encoded = encode_prompts(self.tokenizer, [prompts[i] for i in asked], [names[i] for i in asked])
        by_key = {keys[i]: ids for i, ids in zip(asked, encoded, strict=True)}
        ids = [by_key[key] for key in keys]
        responses = encode_responses(self.tokenizer, answers)
        fitting = [self.fit(*row) for row in zip(ids, responses, names, strict=True)]
        return ids, fitting

    def fit(self, prompt: list[int], response: list[int], name: str) -> list[int]:
        """Return a response, cut where that is asked for, so that its row fits in the context.

        Args:
            prompt: The ids of its prompt.
            response: Its ids.
            name: The location of the prompt, for the error line.

        Raises:
            UserError: It does not fit.
        """
        length = len(prompt) + len(response)
        if self.context is None or length <= self.context:
            return response
        room = self.context - len(prompt)
        if self.on_too_long == "error" or room < 1:
            raise UserError(
                f"{name}: {length} tokens with its response in the reward model's tokenizer, and the reward model "
                f"reads {self.context}; set rm.on_too_long: truncate, ask for shorter responses, or take a reward "
                f"model that reads more"
            )
        return response[:room]


def text_reader_of(folder: Path, tokenizer: Any, on_too_long: str, *, trust_remote_code: bool) -> TextReader | None:
    """Return how a reward model reads texts; None if it reads the policy's own ids.

    Args:
        folder: Of the reward model.
        tokenizer: The policy's.
        on_too_long: The setting of rm.
        trust_remote_code: Whether code that the model brings may run.
    """
    own = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if difference_of(tokenizer, own) is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return TextReader(own, context_of(config), on_too_long)
