"""Text → token ids: chat template, EOS and truncation are decided here, once; every stage gets ready ids.

A row is `prompt_ids + response_ids`. The prompt is the chat template with its generation prompt; the response is
tokenized on its own and ends with EOS, exactly as the policy will have to produce it. A response that was cut off
has no EOS: nobody is taught to end there.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from jinja2 import TemplateError

from data import templates
from data.error_lines import shorten
from data.records import Demonstration, Document, Ranking, as_messages, judged_pairs
from data.templates import TemplateOverrun
from pipeline.errors import UserError

EOS, PAD = "<|end|>", "<|pad|>"
DOCUMENT_END = "document_end"  # a key of tokenizer_config.json: what ended a document in pretraining
DOCUMENT_ENDS = (  # what that is called in models that end turns with something else
    "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOS_TOKEN>", "<eos>", "[EOS]",
    "<|eos|>", "</s>",
)  # fmt: skip
HALF_CHARACTER = "\ufffd"  # what decoding makes of bytes that are no whole character
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class LengthReport:
    """What the length limit did to a data set: how many rows were kept whole, truncated and dropped. equal: the place
    of each pair of different responses that are the same ids within the limit."""

    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0
    problems: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)

    def __add__(self, other: "LengthReport") -> "LengthReport":
        """Return the report of both data sets together."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("kept", "truncated", "dropped"))
        problems, equal = self.problems + other.problems, self.equal + other.equal
        return LengthReport(*sums, max(self.longest, other.longest), problems, equal)

    def line(self, what: str) -> str:
        """One line for people."""
        text = (
            f"{what}: {self.kept} rows, {self.truncated} truncated, {self.dropped} dropped, "
            f"longest {self.longest} tokens"
        )
        if self.equal:
            pairs = f"{len(self.equal)} pair{'s' * (len(self.equal) > 1)}"
            text += f"; {pairs} left out, equal within max_length (the first: {self.equal[0]})"
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer learnt from `texts`, with the chat template above; at most `vocab_size` ids.

    Byte-level, so that any text goes in and comes out unchanged (but for a leading space).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, EOS, *ROLES],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Token ids of a prompt (a string, or messages with system and earlier turns), ready for the assistant's turn.

    Special tokens that occur in a message stay plain text: nobody can end a turn or speak for the assistant.
    """
    name = f"prompt {as_messages(prompt)[-1]['content'][:40]!r}"
    (ids,) = encode_prompts(tokenizer, [prompt], [name])
    return ids


def encode_prompts(tokenizer, prompts: Iterable, names: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt; UserError with the name (the place) of every one that the chat template refuses (some
    take no system message, or only alternating turns)."""
    conversations, ids, problems = [as_messages(prompt) for prompt in prompts], [], []
    try:
        encoded = encode_conversations(tokenizer, conversations, add_generation_prompt=True)
        for found, name in zip(encoded, names, strict=True):
            if isinstance(found, TemplateError):
                problems.append(f"{name}: the model's chat template refuses this prompt ({found}); change its messages")
            else:
                ids.append(found)
    except TemplateOverrun as problem:  # all the other prompts would take as long
        what = f"the model's chat template fails on this prompt ({problem})"
        remedy = "give another template as model.chat_template: FILE, or take another model"
        raise UserError([f"{names[problem.index]}: {what}; {remedy}"]) from problem
    if problems:
        raise UserError(shorten(problems))
    return ids


def render(tokenizer, conversations: Sequence[list[dict]], **options) -> Iterator[list[int] | str | TemplateError]:
    """`templates.render`, the template of the world's tokenizer trusted."""
    return templates.render(tokenizer, conversations, trusted=CHAT_TEMPLATE, **options)


def encode_conversations(
    tokenizer, conversations: Sequence[list[dict]], *, add_generation_prompt: bool
) -> Iterator[list[int] | TemplateError]:
    """Yield the token ids of each conversation as the chat template writes it, or the template's refusal.

    Special tokens that occur in a message stay plain text: each is one private-use character while the template is
    rendered, so that the template sees the rest of the message, and is put back where that character comes out. Other
    added tokens (as <think> of most models) are what the tokenizer makes of them.

    Args:
        tokenizer: The tokenizer with its chat template.
        conversations: Lists of {role, content}.
        add_generation_prompt: Whether the text ends with what opens the assistant's turn.
    """
    special = special_tokens(tokenizer)
    sent, hidden = [], []
    for messages in conversations:
        marked, tokens = _hide(messages, special)
        sent.append(marked)
        hidden.append(tokens)
    options = {"tokenize": [not tokens for tokens in hidden], "add_generation_prompt": add_generation_prompt}
    for found, tokens in zip(render(tokenizer, sent, **options), hidden, strict=True):
        if isinstance(found, TemplateError):
            yield found
        else:
            yield _fill_in(tokenizer, found, tokens) if tokens else list(found)


def end_of_turn(tokenizer) -> str | None:
    """Return the special token that the chat template writes behind an assistant's turn, or None where it writes none.

    Raises:
        TemplateError, or whatever else the template raises: it does not take one question and answer, or does not
        write them.
    """
    asked, mark = "\ue001", "\ue000"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": mark}]
    (text,) = render(tokenizer, [turns], tokenize=[False])
    if isinstance(text, TemplateError):
        raise text
    for what, sign in (("question", asked), ("answer", mark)):
        if sign not in text:
            raise TemplateError(f"it leaves out the {what}, and may want messages in parts, as of text and images")
    behind = text.partition(mark)[2].lstrip()
    return next((token for token in special_tokens(tokenizer) if behind.startswith(token)), None)


def special_tokens(tokenizer) -> list[str]:
    """Return the special tokens of the vocabulary, longest first: those that `split_special_tokens` takes apart. Not
    every added token is one."""
    found = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(found, key=len, reverse=True)


def _hide(messages: list[dict], special: Sequence[str]) -> tuple[list[dict], dict[str, str]]:
    """Return the messages with a character in the place of every special token in their contents, and which token each
    such character stands for ({} where there is none)."""
    found = [token for token in special if any(token in m["content"] for m in messages)]
    if not found:
        return messages, {}
    taken = {c for m in messages for c in m["content"]}
    free = (chr(code) for code in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(code) not in taken)
    marks = dict(zip(found, free, strict=False))
    pattern = re.compile("|".join(map(re.escape, found)))  # longest first
    hide = lambda text: pattern.sub(lambda match: marks[match[0]], text)  # noqa: E731
    return [{**m, "content": hide(m["content"])} for m in messages], {mark: token for token, mark in marks.items()}


def _fill_in(tokenizer, text: str, tokens: dict[str, str]) -> list[int]:
    """Return the token ids of a rendered text.

    Args:
        tokenizer: The tokenizer.
        text: A text in which every special token is the template's own.
        tokens: Character → the special token that it stands for, which stays plain text.

    The stretch between two of the template's special tokens is encoded as one, so that the pieces of a word and the
    blanks around a message come out as without the hidden tokens.
    """
    marked = re.compile(f"[{''.join(tokens)}]")
    ids: list[int] = []
    at = 0
    for begin, end in _stretches(tokenizer, text):
        if marked.search(text, begin, end) is None:
            continue
        ids += tokenizer(text[at:begin], add_special_tokens=False)["input_ids"] if begin > at else []
        plain = marked.sub(lambda match: tokens[match[0]], text[begin:end])
        ids += tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        at = end
    return ids + (tokenizer(text[at:], add_special_tokens=False)["input_ids"] if at < len(text) else [])


def _stretches(tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Yield where the stretches of a text without special tokens begin and end. A token that takes the blanks beside it
    along (lstrip, rstrip) ends behind them."""
    flags = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    parts = []
    for name in special_tokens(tokenizer):
        token = flags.get(name)
        left, right = (r"\s*" if getattr(token, side, False) else "" for side in ("lstrip", "rstrip"))
        parts.append(f"{left}{re.escape(name)}{right}")
    begin = 0
    for match in re.finditer("|".join(parts), text) if parts else ():
        if match.start() > begin:
            yield begin, match.start()
        begin = match.end()
    if begin < len(text):
        yield begin, len(text)


def encode_response(tokenizer, text: str, finished: bool = True) -> list[int]:
    """Return the token ids of a response, with EOS if it is finished.

    Special tokens that occur in the text stay plain text.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, *[tokenizer.eos_token_id] * finished]


def decode_response(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a response, without special tokens and outer blanks.

    Where a response was cut off inside a character of several bytes, that character is left out: it
    would come back as other tokens than were sampled.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not (len(ids) and ids[-1] == tokenizer.eos_token_id):
        text = text.rstrip(HALF_CHARACTER)
    return text.strip()


def fit_lengths(
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    *,
    max_length: int,
    on_too_long: str,
    what: str,
    names: Sequence[str],
    section: str,
):
    """Apply `on_too_long` to rows of one prompt and its responses; → (kept indices, prompts, responses, report).

    For the error lines: what a row is, the name of each (its place), the section of the config that has the limit.
    `error` refuses with every offending row; `drop` leaves the row out; `truncate` cuts the end of the responses
    (their EOS goes with it: a cut answer is not taught to end there), and the row is dropped if its prompt
    leaves less than one token of room. A row counts by its longest response.
    """
    report = LengthReport()
    limit, remedy = f"the limit is {max_length}", f"raise {section}.max_length, or set {section}.on_too_long: drop"
    if any(responses):
        remedy += " or truncate"
    else:
        limit += " (max_length less response_length)"
    kept, out_prompts, out_responses = [], [], []
    for i, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        length = len(prompt) + max((len(r) for r in group), default=0)
        report.longest = max(report.longest, length)
        if length > max_length:
            if on_too_long == "error":
                report.problems.append(f"{names[i]}: {what} of {length} tokens, {limit}; shorten it, {remedy}")
                continue
            if on_too_long == "drop" or len(prompt) >= max_length:
                report.dropped += 1
                continue
            group = [r[: max_length - len(prompt)] for r in group]
            report.truncated += 1
        else:
            report.kept += 1
        kept.append(i)
        out_prompts.append(prompt)
        out_responses.append(list(group))
    if report.problems:
        extra = len(report.problems) - 5
        more = [f"{section}.max_length: {extra} more rows are too long, {limit}; shorten them, {remedy}"]
        raise UserError(report.problems[:5] + (more if extra > 0 else []))
    if not kept:
        raise UserError([f"{section}.max_length: no {what} is left, {limit}; raise it"])
    return kept, out_prompts, out_responses, report


def equal_pairs(ranking: Ranking, responses: Sequence[list[int]]) -> int:
    """Return how many pairs that a ranking judges are of different texts, but of the same ids.

    Args:
        ranking: The ranking.
        responses: The ids of its responses, as a length limit has left them.
    """
    usable = ((i, j) for i, j, verdict in judged_pairs(ranking) if verdict == "usable")
    return sum(responses[i] == responses[j] for i, j in usable)


def encode_demonstrations(tokenizer, rows: Sequence[Demonstration], *, names: Sequence[str], **limits):
    """Demonstrations → (kept indices, rows {input_ids, labels}: loss on the completion and its EOS only, LengthReport).

    limits: max_length, on_too_long and section, as of `fit_lengths`.
    """
    prompts = encode_prompts(tokenizer, (r.prompt for r in rows), names)
    responses = [[encode_response(tokenizer, r.completion)] for r in rows]
    kept, prompts, responses, report = fit_lengths(prompts, responses, what="demonstration", names=names, **limits)
    rows = [{"input_ids": p + r[0], "labels": [-100] * len(p) + r[0]} for p, r in zip(prompts, responses, strict=True)]
    return kept, rows, report


def document_end(tokenizer) -> int:
    """Return the id that ended a document in pretraining, which in a chat model need not be what ends a turn.

    It is the token that `base` has recorded in the tokenizer under DOCUMENT_END; else EOS, if that is one of
    DOCUMENT_ENDS; else the first of these that the vocabulary has; else EOS.
    """
    known, eos = tokenizer.get_vocab(), tokenizer.eos_token
    names = [tokenizer.init_kwargs.get(DOCUMENT_END), *[eos] * (eos in DOCUMENT_ENDS), *DOCUMENT_ENDS]
    return next((known[name] for name in names if name in known), tokenizer.eos_token_id)


def document_start(tokenizer) -> list[int]:
    """Return the ids that begin a document: BOS where the tokenizer adds one by itself, as in pretraining (Gemma,
    Llama), otherwise none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def wrap_documents(tokenizer, rows: Iterable[Document], *, length: int) -> list[list[int]]:
    """Join documents end to end and cut them into rows.

    Args:
        tokenizer: Encodes the texts; special tokens that occur in them stay plain text.
        rows: The documents; each begins with `document_start` and ends with `document_end`.
        length: Ids of a row.

    Returns:
        Rows of `length` ids; a shorter rest is left out.
    """
    stream: list[int] = []
    start, end = document_start(tokenizer), document_end(tokenizer)
    texts = [d.text for d in rows]
    for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []:
        stream.extend([*start, *ids, end])
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
