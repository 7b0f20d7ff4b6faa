"""Whether two tokenizers make the same ids of every text, which is what a policy and its reward model must share.

Padding, and the token that a library takes for the end, are no matter of texts: base may have added the one and changed
the other. Vocabularies are compared token by token; pre-tokenisation and merges on texts of many kinds; chat templates
on what they write.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from jinja2 import TemplateError

from data.conversations import render
from data.encode import encode_response
from data.template_text import with_clock_of
from pipeline.errors import UserError

TEXTS = (  # what pre-tokenisers and normalisers treat in ways of their own
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
PIECES, AT_ONCE = 4096, 32  # tokens of the vocabulary that are made texts of, so many to a text


def same_tokenizer(one, other, where: str) -> None:
    """See to it that two tokenizers make the same ids of texts and conversations.

    Args:
        one: the policy's.
        other: that of a reward or value model.
        where: the folder of the latter, for the line.

    Raises:
        UserError: they do not; the line names a token, a text or what the templates write.
    """
    if tokenizer_fingerprint(one) == tokenizer_fingerprint(other):
        return
    if (difference := difference_of(one, other)) is not None:
        raise UserError(
            f"{where}: its tokenizer is not the policy's ({difference}); policy, reward model and value model must "
            f"make the same ids of a text: train it from this experiment's sft"
        )


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 over the vocabulary, merges, special tokens and chat template."""
    if hasattr(tokenizer, "backend_tokenizer"):  # padding and truncation are whatever the last batch asked for
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


def difference_of(one, other) -> str | None:
    """The first difference that a text can show, in a few words; None if there is none. As `same_tokenizer`."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    for token in ours.keys() & theirs.keys():
        if ours[token] != theirs[token]:
            moved = min((t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t]), key=ours.get)
            return f"the token {moved!r} has id {theirs[moved]} there and {ours[moved]} here"
    for text in probes(one, other):
        mine, its = (encode_response(t, text, finished=False) for t in (one, other))
        if mine != its:
            return f"the text {shown(text)} becomes {named(other, its, mine)} there and {named(one, mine, its)} here"
    if one.eos_token not in theirs:
        return f"answers end with {one.eos_token!r}, which it does not know"
    return template_difference(one, other)


def probes(one, other) -> list[str]:
    """Texts to compare two tokenizers on: TEXTS; every added token of either, in a text; and pieces of the policy's
    vocabulary, evenly taken and strung together, with those that only one of the two knows."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    added = sorted({str(t) for t in [*one.added_tokens_decoder.values(), *other.added_tokens_decoder.values()]})
    texts = [*TEXTS, *(f"a {token} b" for token in added if token.strip())]
    for tokenizer, vocabulary, unknown in ((one, ours, theirs), (other, theirs, ours)):
        alone = [i for token, i in sorted(vocabulary.items()) if token not in unknown and token not in added]
        texts += [tokenizer.decode([i]) for i in alone[: PIECES // AT_ONCE]]
    ids = sorted(i for token, i in ours.items() if token not in added)
    ids = ids[:: max(1, len(ids) // PIECES)]
    texts += [one.decode(ids[at::AT_ONCE][:AT_ONCE]) for at in range(0, min(len(ids), PIECES // AT_ONCE))]
    return texts


def template_difference(one, other) -> str | None:
    """Where the chat templates write something else, as ids; None if nowhere."""
    if other.chat_template is None:
        return "it has no chat template"
    for opens in (True, False):
        for mine, its, asked in zip(written(one, opens), written_alike(other, one, opens), CONVERSATIONS, strict=True):
            if mine == its or (isinstance(mine, TemplateError) and isinstance(its, TemplateError)):
                continue
            what = "a question" if len(asked) == 1 else f"{len(asked)} messages"
            texts = [
                f"refuses {what}" if isinstance(found, TemplateError) else f"writes {named(tokenizer, found, rest)}"
                for tokenizer, found, rest in ((other, its, mine), (one, mine, its))
            ]
            return f"of {what}, its chat template {texts[0]}, and the policy's {texts[1]}"
    return None


def written(tokenizer, opens: bool) -> list:
    """The ids of each of CONVERSATIONS, or the template's refusal. opens: with the prompt for an answer."""
    return list(render(tokenizer, CONVERSATIONS, tokenize=[True] * len(CONVERSATIONS), add_generation_prompt=opens))


def written_alike(tokenizer, one, opens: bool) -> list:
    """As `written`; a clock of the template is stopped as that of `one` is, which base has done: no matter of texts."""
    kept = tokenizer.chat_template
    try:
        if isinstance(kept, str) and isinstance(one.chat_template, str):
            tokenizer.chat_template = with_clock_of(kept, one.chat_template)
        return written(tokenizer, opens)
    finally:
        tokenizer.chat_template = kept


def named(tokenizer, ids: Sequence[int], other: Sequence[int]) -> str:
    """A few tokens of `ids` from where they differ from `other`, with their ids."""
    other = [] if isinstance(other, TemplateError) else other
    at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    tokens = [
        f"{token!r} ({i})"
        for token, i in zip(tokenizer.convert_ids_to_tokens(ids[at : at + 3]), ids[at:], strict=False)
    ]
    return " ".join(tokens) or "nothing more"


def shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


@torch.no_grad()
def fit_rows(model, rows: int):
    """A reward model whose embedding has a row for each id that the policy can sample or pad with: those that it lacks
    are the mean of its own."""
    if (getattr(model.config.get_text_config(), "vocab_size", None) or 0) >= rows:  # some name no embedding (TrOCR)
        return model
    have = model.get_input_embeddings().weight.shape[0]
    if have < rows:
        mean = model.get_input_embeddings().weight.mean(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight[have:] = mean
    return model
