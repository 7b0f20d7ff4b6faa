"""Score responses by a reward model with a tokenizer of its own, or with several logits.

The conversation and the response are rendered with the reward model's own chat template, as its
authors do it. The score is its logit, minus `reward_bias` if its config has one; of several logits
it is their sum, each times its weight in `heads`, and each is a part of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from data.conversations import encode_conversations
from pipeline.errors import UserError
from stages.models.adapter_folder import weights_folder, with_adapter_of
from stages.models.ensemble import combine
from stages.models.precision import DTYPES, frozen
from stages.models.remote_code import from_pretrained, is_remote
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores
from stages.settings.scorers.model import ModelScorer


class TextModelScorer:
    """Score by one model, or by an ensemble of them, each with its own tokenizer."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        assert isinstance(spec.settings, ModelScorer)
        self.spec, self.settings = spec, spec.settings
        self.members = [Member(folder, spec) for folder in folders_of(self.settings)]

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> Scores:
        """Return the scores, on the CPU.

        Raises:
            UserError: A conversation does not fit in a model's context, or its template.
        """
        conversations = [
            [*prompt, {"role": "assistant", "content": text}]
            for prompt, text in zip(request.conversations(), request.response_texts(), strict=True)
        ]
        found = [member.logits(conversations, request) for member in self.members]  # (B, H) each
        heads = torch.tensor(self.settings.heads or [1.0])
        scores = [(logits * heads).sum(-1) - member.bias for logits, member in zip(found, self.members, strict=True)]
        total = combine(scores, self.settings.how, self.settings.deviations)
        if len(self.members) > 1:
            return Scores(total, {str(index): score for index, score in enumerate(scores)})
        if self.settings.heads is None:
            return Scores(total)
        return Scores(total, dict(zip(self.members[0].labels, found[0].unbind(-1), strict=True)))

    def close(self) -> None:
        """Free the models."""
        self.members = []


class Member:
    """A reward model with its tokenizer."""

    def __init__(self, folder: Path, spec: ScorerSpec) -> None:
        """Load the model onto the device.

        Args:
            folder: Its folder.
            spec: Device, precision and batch size.

        Raises:
            UserError: It is no reward model, or not one that these settings describe.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        assert isinstance(spec.settings, ModelScorer)
        self.folder, self.spec = folder, spec
        trust = spec.trust_remote_code
        self.tokenizer = from_pretrained(AutoTokenizer, folder, trust_remote_code=trust)
        model, info = from_pretrained(
            AutoModelForSequenceClassification,
            weights_folder(folder),
            trust_remote_code=trust,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise UserError(
                f"{spec.name}: the model in {folder} lacks the weights {sorted(info['missing_keys'])[:3]}, which would "
                f"be random; give a trained reward model"
            )
        # its own code may compute something outside autocast
        dtype = "float32" if is_remote(model) else DTYPES[spec.accelerator.mixed_precision]
        model = frozen(with_adapter_of(model, folder), dtype)
        self.model: nn.Module = model.eval().to(spec.accelerator.device)
        config: Any = model.config
        self.bias = float(getattr(config, "reward_bias", 0.0) or 0.0)
        self.labels = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None)
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"{spec.name}: the reward model in {folder} has no chat template; add its chat_template.jinja"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # transformers finds the last token of a row by it
        config.pad_token_id = self.tokenizer.pad_token_id
        weights = spec.settings.heads
        if len(self.labels) != len(weights or [1.0]):
            raise UserError(
                f"{spec.name}: the model in {folder} has {len(self.labels)} logits ({', '.join(self.labels[:6])}); "
                f"give heads a weight for each"
            )

    def logits(self, conversations: Sequence[list[dict]], request: ScoreRequest) -> Tensor:
        """Return the logits (B, H) of conversations, on the CPU.

        Args:
            conversations: Messages that end with the response.
            request: Its `poll` is called between batches.

        Raises:
            UserError: A conversation does not fit in the model's context, or its template.
        """
        ids = self.encode(conversations)
        for i, row in enumerate(ids):
            if self.context is not None and len(row) > self.context:
                raise UserError(
                    f"{self.spec.name}: a conversation has {len(row)} tokens, and the context of {self.folder} is "
                    f"{self.context}: {json.dumps(conversations[i][0]['content'])[:60]}; lower max_length"
                )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        logits = torch.zeros(len(ids), len(self.labels))
        for start in range(0, len(order), self.spec.batch_size):
            request.poll()
            index = order[start : start + self.spec.batch_size]
            width = max(len(ids[i]) for i in index)
            pad = self.tokenizer.pad_token_id
            rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in index])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in index])
            device = self.spec.accelerator.device
            with self.spec.accelerator.autocast():
                found = self.model(input_ids=rows.to(device), attention_mask=mask.to(device)).logits
            logits[index] = found.float().cpu()
        return logits

    def encode(self, conversations: Sequence[list[dict]]) -> list[list[int]]:
        """Return the token ids of conversations through the model's own chat template.

        Special tokens that occur in a message stay plain text: a policy must not learn to write
        them.

        Args:
            conversations: Messages that end with the response.

        Raises:
            UserError: The template refuses a conversation, or takes too long.
        """
        ids: list[list[int]] = []
        remedy = "take such prompts out, or take another reward model"
        try:
            for encoded in encode_conversations(self.tokenizer, conversations, add_generation_prompt=False):
                if isinstance(encoded, TemplateError):
                    raise encoded
                ids.append(encoded)
        except TemplateError as refusal:
            prompt = json.dumps(conversations[len(ids)][0]["content"])[:60]
            raise UserError(
                f"{self.spec.name}: the chat template of {self.folder} fails on the prompt {prompt} ({refusal}); "
                f"{remedy}"
            ) from refusal
        return ids


def folders_of(settings: ModelScorer) -> list[Path]:
    """Return the folders of the models, a Hub id's after its download.

    Raises:
        UserError: The Hub id cannot be downloaded.
    """
    hub_id = settings.hub_id()
    if hub_id is None:
        return settings.folders()
    from huggingface_hub import snapshot_download

    try:
        return [Path(snapshot_download(hub_id, revision=settings.revision))]
    except Exception as error:
        raise UserError(
            f"{hub_id}: cannot be downloaded ({type(error).__name__}); check the id, the commit and the network"
        ) from error
