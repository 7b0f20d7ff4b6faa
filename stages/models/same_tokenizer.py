"""Check that two tokenizers make the same ids of every text, as policy and reward model must.

Padding, and which token a library takes for the end, do not matter to texts: base may have added
the one and changed the other. Vocabularies are compared token by token; pre-tokenization and merges
on texts of many kinds; chat templates by what they write.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn

from data.conversations import render
from data.encode import encode_response
from data.template_text import with_clock_of
from pipeline.errors import UserError

TEXTS = (  # pre-tokenizers and normalizers differ on these
    "The quick brown fox jumps over the lazy dog. It's 3.14, isn't it?",
    "  two blanks before, two behind  ",
    "a\n\nb\r\n\tc \n d\n",
    "1234567890 1,000,000 3/4 2026-11-29 12:30",
    "def f(x):\n    return x ** 2  # a comment\n",
    "naïve café Ångström ﬁne — “quotes” … ½",
    "e\u0301 A\u030a \u00a0no-break\u2003em\u200bzero",
    "Русский текст, Ελληνικά, العربية, עברית, हिन्दी, ไทย",
    "日本語の文章。中文，标点！ 한국어",
    "👍🏽 🇩🇪 👩‍👩‍👧 \U0001f600",
    "ALLCAPS camelCase snake_case kebab-case",
    "http://example.org/a?b=c&d=e#f user@example.org",
    "<b>html</b> {\"json\": [1, null]} $x^2$ \\alpha",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!! ----------",
)  # fmt: skip
ASKED, SAID = {"role": "user", "content": "What color is the fox?"}, {"role": "assistant", "content": "It is red."}
CONVERSATIONS = (
    [ASKED],
    [{"role": "system", "content": "Be brief."}, ASKED],
    [ASKED, SAID, {"role": "user", "content": "  And\nthe bird? "}],
    [ASKED, SAID],
)
PIECES = 4096  # tokens of the vocabulary to compare on
AT_ONCE = 32  # of them in a text


def check_same_tokenizer(one: Any, other: Any, where: str) -> None:
    """Check that two tokenizers make the same ids of texts and conversations.

    Args:
        one: The policy's.
        other: Of a reward or value model.
        where: The folder of the latter, for the error line.

    Raises:
        UserError: They do not; the line names a token, a text or what the templates write.
    """
    if (difference := difference_of(one, other)) is not None:
        raise UserError(
            f"{where}: its tokenizer is not the policy's ({difference}); policy, reward model and value model must "
            f"make the same ids of a text: train it from this experiment's sft"
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of vocabulary, merges, special tokens and chat template."""
    if hasattr(tokenizer, "backend_tokenizer"):  # padding and truncation depend on the last batch
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        backend = sorted(tokenizer.get_vocab().items())
    parts = [
        json.dumps(backend, sort_keys=True),
        str(tokenizer.eos_token_id),
        str(tokenizer.pad_token_id),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def difference_of(one: Any, other: Any) -> str | None:
    """Return the first difference that a text can show, in a few words, or None.

    Arguments are those of `check_same_tokenizer`.
    """
    if tokenizer_fingerprint(one) == tokenizer_fingerprint(other):
        return None  # the usual case, without a text
    ours, theirs = one.get_vocab(), other.get_vocab()
    for token in ours.keys() & theirs.keys():
        if ours[token] != theirs[token]:
            moved = min((t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t]), key=ours.get)
            return f"the token {moved!r} has id {theirs[moved]} there and {ours[moved]} here"
    for text in probe_texts(one, other):
        mine, its = (encode_response(t, text, finished=False) for t in (one, other))
        if mine != its:
            there, here = named_tokens(other, its, mine), named_tokens(one, mine, its)
            return f"the text {shortened(text)} becomes {there} there and {here} here"
    if one.eos_token not in theirs:
        return f"answers end with {one.eos_token!r}, which it does not know"
    return template_difference(one, other)


def probe_texts(one: Any, other: Any) -> list[str]:
    """Return texts to compare two tokenizers on.

    They are TEXTS; every added token of either one, within a text; tokens that only one of them
    has; and tokens of the policy's vocabulary, evenly chosen and joined.

    Args:
        one: The policy's.
        other: The other one.
    """
    ours, theirs = one.get_vocab(), other.get_vocab()
    added = sorted({str(t) for t in [*one.added_tokens_decoder.values(), *other.added_tokens_decoder.values()]})
    texts = [*TEXTS, *(f"a {token} b" for token in added if token.strip())]
    for tokenizer, vocabulary, unknown in ((one, ours, theirs), (other, theirs, ours)):
        only_here = [i for token, i in sorted(vocabulary.items()) if token not in unknown and token not in added]
        texts += [tokenizer.decode([i]) for i in only_here[: PIECES // AT_ONCE]]
    ids = sorted(i for token, i in ours.items() if token not in added)
    ids = ids[:: max(1, len(ids) // PIECES)]
    texts += [one.decode(ids[at::AT_ONCE][:AT_ONCE]) for at in range(0, min(len(ids), PIECES // AT_ONCE))]
    return texts


def template_difference(one: Any, other: Any) -> str | None:
    """Return where the chat templates write different ids, in a few words, or None.

    Arguments are those of `probe_texts`.
    """
    if other.chat_template is None:
        return "it has no chat template"
    for opens in (True, False):
        for mine, its, asked in zip(
            template_ids(one, opens), template_ids_at_clock_of(other, one, opens), CONVERSATIONS, strict=True
        ):
            if mine == its or (isinstance(mine, TemplateError) and isinstance(its, TemplateError)):
                continue
            what = "a question" if len(asked) == 1 else f"{len(asked)} messages"
            texts = [
                f"refuses {what}"
                if isinstance(found, TemplateError)
                else f"writes {named_tokens(tokenizer, found, rest)}"
                for tokenizer, found, rest in ((other, its, mine), (one, mine, its))
            ]
            return f"of {what}, its chat template {texts[0]}, and the policy's {texts[1]}"
    return None


def template_ids(tokenizer: Any, opens: bool) -> list:
    """Return the ids of each of CONVERSATIONS, or the template's refusal.

    Args:
        tokenizer: Has the template.
        opens: Whether the text ends with what opens the answer.
    """
    return list(render(tokenizer, CONVERSATIONS, tokenize=[True] * len(CONVERSATIONS), add_generation_prompt=opens))


def template_ids_at_clock_of(tokenizer: Any, one: Any, opens: bool) -> list:
    """Return the result of `template_ids` with the clock stopped as in the policy's template.

    base stops the clock, which makes no difference to texts.

    Args:
        tokenizer: The other tokenizer.
        one: The policy's.
        opens: As of `template_ids`.
    """
    kept = tokenizer.chat_template
    try:
        if isinstance(kept, str) and isinstance(one.chat_template, str):
            tokenizer.chat_template = with_clock_of(kept, one.chat_template)
        return template_ids(tokenizer, opens)
    finally:
        tokenizer.chat_template = kept


def named_tokens(tokenizer: Any, ids: Sequence[int], other: Sequence[int]) -> str:
    """Return a few tokens, with their ids, from where two lists of ids differ.

    Args:
        tokenizer: Names the tokens.
        ids: The list to show.
        other: The list to compare with, or a template's refusal.
    """
    other = [] if isinstance(other, TemplateError) else other
    at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    tokens = [
        f"{token!r} ({i})"
        for token, i in zip(tokenizer.convert_ids_to_tokens(ids[at : at + 3]), ids[at:], strict=False)
    ]
    return " ".join(tokens) or "nothing more"


def shortened(text: str) -> str:
    """Return a text in quotes, shortened to 40 characters."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


@torch.no_grad()
def fit_rows(model: nn.Module, rows: int) -> nn.Module:
    """Give a reward model a row for each id that the policy can sample or pad with.

    Args:
        model: Changed; missing rows of the embedding become the mean of its own.
        rows: How many rows are needed at least.

    Returns:
        The model.
    """
    if (getattr(model.config.get_text_config(), "vocab_size", None) or 0) >= rows:  # TrOCR does not name its embedding
        return model
    have = model.get_input_embeddings().weight.shape[0]
    if have < rows:
        mean = model.get_input_embeddings().weight.mean(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight[have:] = mean
    return model
