r"""Convert preference pairs: `chosen` and `rejected` with or without a prompt.

A pair is a ranking of K = 2, the chosen response first. Each of both may be an answer, or a whole
conversation that ends with it: messages, or a transcript of Anthropic's hh-rlhf. Two conversations
must be the same up to their last answers; pairs that part earlier are left out, and counted.
"""

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.instructions import INSTRUCTION_KEYS, read_instruction
from data.forms.judged import PARTED, number, shared_prompt, shared_start
from data.forms.messages import LIST_OF_MESSAGES, SYSTEM_KEYS, Messages, read_conversation, read_messages, read_prompt
from data.forms.plain import RANKING_KEYS, read_reply
from data.forms.scores import ranks_of_scores
from data.forms.transcripts import hh_prompt, is_hh, split_hh
from data.records import as_messages

PAIR = ("chosen", "rejected")
SCORE_NAMES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen_reward", "rejected_reward"),
    ("reward_chosen", "reward_rejected"),
)
"""Names under which data sets give the scores of a pair."""
SCORE_KEYS = tuple(key for names in SCORE_NAMES for key in names)
PAIR_KEYS = (*RANKING_KEYS, "score_chosen", "score_rejected")
"""Keys that a pair may have, beside the other names of its scores."""


def ranking_from_pair(prompt: str | Messages, row: Row, options: Options) -> Row:
    """Return a row of our ranking form, the chosen response ranked 1.

    Args:
        prompt: The prompt of both responses.
        row: The row with `chosen`, `rejected`, and perhaps the keys of PAIR_KEYS.
        options: What the source says.

    Raises:
        LeftOut: The two are conversations with different prompts.
    """
    refuse_names(row)
    prompt, responses = read_replies(prompt, row, options)
    optional = {key: row.get(key) for key in RANKING_KEYS}
    ranks: list[int | None] = [1, 2]
    scores = read_scores(row, options)
    if scores is not None:
        optional["scores"] = scores
        ranks = ranks_of_scores(scores, options.tie_within)
    return {"prompt": prompt, "responses": responses, "ranks": ranks, **optional}


def refuse_names(row: Row) -> None:
    """Raise ValueError where the two are names: of keys with answers, or of models."""
    names = [row.get(key) for key in PAIR]
    if not all(isinstance(name, str) for name in names):
        return
    for stem in ("", "response_", "answer_", "completion_"):
        keys = [f"{stem}{name}" for name in names]
        if keys[0] != keys[1] and all(key in row for key in keys):
            raise ValueError(f"'chosen' names the answer under '{keys[0]}'; give the texts themselves")
    models = {value for key, value in row.items() if key.startswith("model") and isinstance(value, str)}
    if len(models) > 1 and set(names) == models:
        raise ValueError("'chosen' and 'rejected' are names of models; give the texts of their answers")


def read_scores(row: Row, options: Options) -> list[float] | None:
    """Return the scores of `chosen` and `rejected` under any of their names; None without both."""
    for names in SCORE_NAMES:
        if options.ignore.intersection(names):
            continue
        chosen, rejected = (number(row.get(name), name) for name in names)
        if chosen is None or rejected is None:
            continue
        if chosen < rejected:
            problem = f"'chosen' has the lower score ({names[0]} {chosen:g}, {names[1]} {rejected:g})"
            raise ValueError(f"{problem}; correct it, or say ignore: [{', '.join(names)}] to go by 'chosen'")
        return [chosen, rejected]
    return None


def read_replies(prompt: str | Messages, row: Row, options: Options) -> tuple[str | Messages, list[str]]:
    """Read the two responses, and the prompt that they answer.

    Whole conversations may hold more of the prompt than the key `prompt`: a system message, or
    further turns. Then they say what the prompt is.

    Args:
        prompt: The prompt of the row.
        row: The row with `chosen` and `rejected`.
        options: What the source says.

    Returns:
        (prompt, [chosen, rejected])
    """
    if isinstance(prompt, str) and is_hh(prompt):
        prompt = hh_prompt(prompt)
        answers = {key: row[key] for key in PAIR if isinstance(row[key], str) and not is_hh(row[key])}
        row = row | {key: text.strip().removeprefix("Assistant:").strip() for key, text in answers.items()}
    whole = [whole_conversation(row[key]) for key in PAIR]
    if whole[0] is None or whole[1] is None:
        return prompt, [read_reply(row, key, prompt) for key in PAIR]
    before = as_messages(prompt)
    # Where they begin with an answer, they go on where the prompt ends.
    conversations = [
        before + messages if messages[0]["role"] == "assistant" else messages for messages in whole if messages
    ]
    shared = shared_prompt(conversations)
    if before[:1] != shared[:1] and before[0]["role"] == "system" and shared[:1] and shared[0]["role"] != "system":
        shared = [before[0], *shared]  # the system message stands beside the prompt only
    if "prompt" in options.ignore or holds(shared, before):
        responses = [messages[-1]["content"] for messages in conversations]
        return (prompt if shared == before else shared), responses
    raise ValueError(
        "'chosen' and 'rejected' are conversations about another prompt than 'prompt'; correct it, or say "
        "ignore: [prompt] to take theirs"
    )


def whole_conversation(value: object) -> Messages | None:
    """Return a conversation with its prompt; None where the value is only an answer."""
    if is_hh(value):
        return read_transcript(value)
    if not isinstance(value, list) or len(value) < 2:
        return None
    messages = read_messages(value, blank_end=True)
    return messages if any(message["role"] == "user" for message in messages) else None


def holds(conversation: Messages, prompt: Messages) -> bool:
    """Return whether the messages of a prompt stand one after the other in a conversation."""
    length = len(prompt)
    starts = range(len(conversation) - length + 1)
    return any(conversation[start : start + length] == prompt for start in starts)


def read_transcript(value: object) -> Messages:
    """Read a whole conversation: messages, or a string as in hh-rlhf."""
    if not isinstance(value, str) or LIST_OF_MESSAGES.match(value):
        return read_messages(value, blank_end=True)
    messages = split_hh(value)
    if any(not message["content"] for message in messages[:-1]):
        raise LeftOut("a transcript with a blank turn")
    return read_messages(messages, blank_end=True)


def prompt_pair(row: Row, options: Options) -> Row:
    """Convert {prompt, chosen, rejected}."""
    return ranking_from_pair(read_prompt(row), row, options)


def conversation_pair(row: Row, options: Options) -> Row:
    """Convert {conversations, chosen, rejected}."""
    return ranking_from_pair(read_conversation(row), row, options)


def messages_pair(row: Row, options: Options) -> Row:
    """Convert {messages, chosen, rejected}; `messages` may also be the chosen conversation."""
    messages = read_conversation(row)
    if messages[-1]["role"] == "assistant" and whole_conversation(row["chosen"]) == messages:
        return bare_pair(row, options)
    return ranking_from_pair(messages, row, options)


def instruction_pair(row: Row, options: Options) -> Row:
    """Convert {instruction, chosen, rejected}."""
    return ranking_from_pair(read_instruction(row), row, options)


def bare_pair(row: Row, options: Options) -> Row:
    """Convert {chosen, rejected}, two whole conversations."""
    whole = {key: read_transcript(row[key]) for key in PAIR}
    return ranking_from_pair(shared_prompt(list(whole.values())), {**row, **whole}, options)


def prompt_of_bare_pair(row: Row, options: Options) -> Row:
    """Take only the prompt of two whole conversations: what they begin with alike."""
    shared = shared_start([read_transcript(row[key]) for key in PAIR])
    if not shared:
        raise LeftOut(PARTED)
    return {"prompt": shared}


POOL = frozenset(["messages", "response", "responses", "generations", "completions", "ratings", *SCORE_KEYS])
"""Keys of what a pair was chosen from, which say nothing more about the pair."""
PROMPT_PAIR = Form(("prompt", *PAIR), (*PAIR_KEYS, *SYSTEM_KEYS), prompt_pair, harmless=POOL)
CONVERSATION_PAIR = Form(("conversations", *PAIR), (*PAIR_KEYS, *SYSTEM_KEYS), conversation_pair, harmless=POOL)
MESSAGES_PAIR = Form(("messages", *PAIR), (*PAIR_KEYS, *SYSTEM_KEYS), messages_pair, harmless=POOL)
INSTRUCTION_PAIR = Form(("instruction", *PAIR), (*PAIR_KEYS, *INSTRUCTION_KEYS), instruction_pair, harmless=POOL)
BARE_PAIR = Form(PAIR, PAIR_KEYS, bare_pair, harmless=POOL)
BARE_PAIR_PROMPT = Form(PAIR, (), prompt_of_bare_pair)
PAIRS = (PROMPT_PAIR, CONVERSATION_PAIR, MESSAGES_PAIR, INSTRUCTION_PAIR, BARE_PAIR)
