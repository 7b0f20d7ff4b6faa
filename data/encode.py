"""Text → token ids: chat template, EOS and truncation are decided here, once; every stage gets ready ids.

A row is `prompt_ids + response_ids`. The prompt is the chat template with its generation prompt; the response is
tokenized on its own and ends with EOS, exactly as the policy will have to produce it. A response that was cut off
has no EOS: nobody is taught to end there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from data import templates
from data.records import DataError, Demonstration, Document, as_messages
from data.templates import TemplateOverrun

EOS, PAD = "<|end|>", "<|pad|>"
HALF_CHARACTER = "\ufffd"  # what decoding makes of bytes that are no whole character
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class LengthReport:
    """What the length limit did to a data set: how many rows were kept whole, truncated and dropped."""

    kept: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0
    problems: list[str] = field(default_factory=list)

    def __add__(self, other: "LengthReport") -> "LengthReport":
        """Of both data sets together."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("kept", "truncated", "dropped"))
        return LengthReport(*sums, max(self.longest, other.longest), self.problems + other.problems)

    def line(self, what: str) -> str:
        """One line for people."""
        return (
            f"{what}: {self.kept} rows, {self.truncated} truncated, {self.dropped} dropped, "
            f"longest {self.longest} tokens"
        )


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
    """Token ids of each prompt; DataError with the name (the place) of every one that the chat template refuses (some
    take no system message, or only alternating turns)."""
    conversations, ids, problems = [as_messages(prompt) for prompt in prompts], [], []
    try:
        for found, name in zip(_encode(tokenizer, conversations), names, strict=True):
            if isinstance(found, TemplateError):
                problems.append(f"{name}: the model's chat template refuses this prompt ({found}); change its messages")
            else:
                ids.append(found)
    except TemplateOverrun as problem:  # all the other prompts would take as long
        what = f"the model's chat template fails on this prompt ({problem})"
        raise DataError([f"{names[problem.index]}: {what}; mend the template, or take another model"]) from problem
    if problems:
        raise DataError(problems)
    return ids


def render(tokenizer, conversations: Sequence[list[dict]], **options) -> Iterator[list[int] | str | TemplateError]:
    """`templates.render`, the template of the world's tokenizer trusted."""
    return templates.render(tokenizer, conversations, trusted=CHAT_TEMPLATE, **options)


def _encode(tokenizer, conversations: list[list[dict]]) -> Iterator[list[int] | TemplateError]:
    """Yield the token ids of each conversation, or the refusal of the template."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    plain = [not any(token in m["content"] for m in messages for token in special) for messages in conversations]
    sent = [
        messages if is_plain else [{**m, "content": mark(i)} for i, m in enumerate(messages)]
        for messages, is_plain in zip(conversations, plain, strict=True)
    ]
    rendered = render(tokenizer, sent, tokenize=plain, add_generation_prompt=True)
    for found, messages, is_plain in zip(rendered, conversations, plain, strict=True):
        if isinstance(found, TemplateError):
            yield found
        else:
            yield list(found) if is_plain else _fill_in(tokenizer, found, messages)


def mark(i: int) -> str:
    """What stands in the place of message `i` while the template is rendered: private-use characters."""
    return f"\ue000{i}\ue001"


def _fill_in(tokenizer, text: str, messages: list[dict]) -> list[int] | TemplateError:
    """The token ids of a rendered text with the messages in the place of their marks, as plain text."""
    ids: list[int] = []
    if not all(mark(i) in text for i in range(len(messages))):
        return TemplateError("it leaves out a message")
    for i, message in enumerate(messages):
        before, text = text.split(mark(i), 1)
        ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids + tokenizer(text, add_special_tokens=False)["input_ids"]


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
        raise DataError(report.problems[:5] + (more if extra > 0 else []))
    if not kept:
        raise DataError([f"{section}.max_length: no {what} is left, {limit}; raise it"])
    return kept, out_prompts, out_responses, report


def encode_demonstrations(tokenizer, rows: Sequence[Demonstration], *, names: Sequence[str], **limits):
    """Demonstrations → (kept indices, rows {input_ids, labels}: loss on the completion and its EOS only, LengthReport).

    limits: max_length, on_too_long and section, as of `fit_lengths`.
    """
    prompts = encode_prompts(tokenizer, (r.prompt for r in rows), names)
    responses = [[encode_response(tokenizer, r.completion)] for r in rows]
    kept, prompts, responses, report = fit_lengths(prompts, responses, what="demonstration", names=names, **limits)
    rows = [
        {"input_ids": p + r[0], "labels": [-100] * len(p) + r[0]} for p, r in zip(prompts, responses, strict=True)
    ]
    return kept, rows, report


def document_end(tokenizer) -> int:
    """The id that ends a document: <|endoftext|> where a chat model keeps one beside the end of a turn, else EOS."""
    return tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)


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
