"""Ask a language model, at a server or here. What was asked once is not asked again."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from pipeline.errors import UserError
from stages.scorers.http import RequestFailed, key_headers, post_json
from stages.scorers.records import Records, key_of
from stages.scorers.scorer import ScorerDropped, ScorerLost, ScorerSpec
from stages.scorers.threads import in_threads
from stages.settings.checks import context_of
from stages.settings.scorers.judge import JudgeScorer

USERS_MISTAKES = {400, 401, 403, 404, 405, 413, 422}
"""HTTP statuses that the same request gets again."""
LIKELIEST = 1e-9
"""A top_p that keeps only the likeliest token."""


class Model(Protocol):
    """Answer questions."""

    def key(self, question: str, attempt: int) -> str:
        """Return the key of an answer: what the question, the model and its settings are."""

    def ask(
        self, questions: Sequence[tuple[str, int]], poll: Callable[[], None]
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Yield (indices of questions, answers) as answers come.

        Args:
            questions: Each with the number of the attempt, from 0 on.
            poll: Is called while waiting.
        """

    def close(self) -> None:
        """Free what is held. May be called twice."""


class Asker:
    """Ask a model, and record what it answers."""

    def __init__(self, spec: ScorerSpec) -> None:
        """Read what an earlier start of the run has recorded.

        Raises:
            UserError: If the environment lacks the server's key.
        """
        assert isinstance(spec.settings, JudgeScorer)
        self.model: Model = Local(spec) if spec.settings.is_local else Server(spec)
        self.records = None if spec.records is None else Records(spec.records / spec.name)
        self.known: dict[str, str] = {}

    def answers(self, questions: Sequence[tuple[str, int]], poll: Callable[[], None]) -> list[str]:
        """Return the answer to each question.

        Args:
            questions: Each with the number of the attempt, from 0 on.
            poll: Is called while waiting; what it raises ends it.

        Raises:
            ScorerLost: If the model does not answer for now.
            UserError: If the user has to change something.
        """
        keys = [self.model.key(*question) for question in questions]
        if self.records is not None:
            self.known |= {key: self.records[key] for key in keys if key in self.records}
        wanted = {key: one for key, one in zip(keys, questions, strict=True) if key not in self.known}
        names = list(wanted)
        for indices, answers in self.model.ask(list(wanted.values()), poll) if wanted else ():
            new = {names[i]: answer for i, answer in zip(indices, answers, strict=True)}
            if self.records is not None:
                self.records.add(new)
            self.known |= new
        return [self.known[key] for key in keys]

    def close(self) -> None:
        """Free the model, and close the file of the records."""
        self.model.close()
        if self.records is not None:
            self.records.close()


class Server:
    """Ask a model at an OpenAI-compatible server."""

    def __init__(self, spec: ScorerSpec) -> None:
        """Take the settings, and the key from the environment."""
        assert isinstance(spec.settings, JudgeScorer) and spec.settings.base_url is not None
        self.settings, self.name = spec.settings, spec.name
        self.headers = key_headers(spec.settings.key_env)
        base = spec.settings.base_url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def body(self, question: str, attempt: int) -> dict[str, Any]:
        """Return the body of a request."""
        fields = {
            "model": self.settings.judge,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.settings.temperature,
            "seed": self.settings.seed + attempt,
            "max_tokens": self.settings.max_tokens,
        } | self.settings.body
        return {name: value for name, value in fields.items() if value is not None}

    def key(self, question: str, attempt: int) -> str:
        """Return the key of an answer."""
        return key_of([self.url, self.body(question, attempt), attempt])

    def ask(
        self, questions: Sequence[tuple[str, int]], poll: Callable[[], None]
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Yield answers as they come, several requests at a time.

        Raises:
            ScorerLost, ScorerDropped: If the server does not answer.
            UserError: If it refuses what it is asked.
        """

        def post(question: tuple[str, int], stop: threading.Event) -> str:
            value = post_json(
                self.url,
                self.body(*question),
                timeout=self.settings.timeout,
                retries=self.settings.retries,
                headers=self.headers,
                stop=stop,
            )
            return text_of(value)

        try:
            for index, answer in in_threads(questions, post, self.settings.concurrency, poll):
                yield [index], [answer]
        except RequestFailed as failed:
            line = f"{self.name}: {self.url.partition('?')[0]} {failed}"
            if failed.status in USERS_MISTAKES:
                raise UserError(f"{line}; correct judge, base_url, key_env or body") from None
            if self.settings.may_drop():
                raise ScorerDropped(line) from None
            raise ScorerLost(f"{line}; run again to resume when the server answers") from None

    def close(self) -> None:
        """Do nothing: each request has a connection of its own."""


def text_of(value: Any) -> str:
    """Return the text of an answer of /chat/completions; "" where the model said nothing.

    Raises:
        RequestFailed: If it is no such answer.
    """
    try:
        content = value["choices"][0]["message"].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed("answers without choices[0].message; is it an OpenAI-compatible address?") from None
    if isinstance(content, list):  # in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


class Local:
    """Ask a language model that runs here: it is loaded when first asked, and it is greedy."""

    def __init__(self, spec: ScorerSpec) -> None:
        """Take the settings."""
        assert isinstance(spec.settings, JudgeScorer)
        self.settings, self.name, self.accelerator = spec.settings, spec.name, spec.accelerator
        self.loaded: tuple[Any, Any] | None = None

    def key(self, question: str, attempt: int) -> str:
        """Return the key of an answer; a greedy one does not depend on the attempt."""
        return key_of([self.settings.judge, self.settings.revision, self.settings.max_tokens, question])

    def ask(
        self, questions: Sequence[tuple[str, int]], poll: Callable[[], None]
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Yield answers, a batch at a time.

        Raises:
            UserError: If the model cannot be loaded, or a question is too long for it.
        """
        from data.encode import decode_response, encode_prompt
        from stages.rollouts.transformers import Decoding, sample

        model, tokenizer = self.load()
        length = self.settings.max_tokens
        context = context_of(model.config.to_dict())
        prompts = [encode_prompt(tokenizer, question) for question, _ in questions]
        longest = max(len(ids) for ids in prompts)
        if context is not None and longest + length > context:
            raise UserError(
                f"{self.name}: a question of {longest} tokens and an answer of {length} do not fit into the "
                f"judge's context of {context}; lower max_tokens, or give another judge"
            )
        decoding = Decoding(
            response_length=length,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            top_p=LIKELIEST,
            batch_size=self.settings.batch_size,
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together
        for start in range(0, len(order), self.settings.batch_size):
            chosen = order[start : start + self.settings.batch_size]
            with self.accelerator.autocast():
                sampled = sample(model, [prompts[i] for i in chosen], [0] * len(chosen), decoding, poll)
            yield chosen, [decode_response(tokenizer, ids) for ids in sampled]

    def load(self) -> tuple[Any, Any]:
        """Return the model on its device and its tokenizer; load them the first time."""
        if self.loaded is None:
            from stages.models.loading import load_pretrained

            folder = self.settings.folder()
            model, tokenizer = load_pretrained(
                self.settings.judge if folder is None else str(folder),
                attn_implementation="sdpa",
                trust_remote_code=False,
                revision=self.settings.revision,
                where=self.name,
            )
            if tokenizer.chat_template is None:
                raise UserError(f"{self.name}: {self.settings.judge} has no chat template; give a model for chats")
            self.loaded = model.requires_grad_(False).to(self.accelerator.device), tokenizer
        return self.loaded

    def close(self) -> None:
        """Free the model."""
        self.loaded = None
