"""Convert preference pairs as training tools and services write them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.instructions import INSTRUCTION_KEYS, read_instruction
from data.forms.judged import judged_conversations, number, shared_start
from data.forms.messages import SYSTEM_KEYS, Messages, read_conversation, read_messages, read_prompt, system_of
from data.forms.plain import RANKING_KEYS, read_reply
from data.forms.preferences import POOL, SCORE_KEYS, ranking_from_pair
from data.forms.questions import read_question
from data.forms.scores import ranks_of_scores
from data.forms.transcripts import NEMO_END, is_nemo, split_nemo
from data.parsing import describe, parse_list
from data.records import prompt_key

# ── OpenAI, Azure ────────────────────────────────────────────────────────────────────────────────


def service_prompt(row: Row, options: Options) -> Row:
    """Take the conversation of `input`; one with tools is refused."""
    given = row["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise ValueError(f"'input' is {describe(given)}; expected {{messages}}")
    if given.get("tools") and "tools" not in options.ignore:
        raise ValueError("'input' has tools, which are not read; take such rows out, or say ignore: [tools]")
    return {"prompt": read_messages(given["messages"])}


def service_pair(row: Row, options: Options) -> Row:
    """Convert {input: {messages}, preferred_output, non_preferred_output}."""
    prompt = service_prompt(row, options)["prompt"]
    outputs = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return ranking_from_pair(prompt, outputs, options)


# ── ms-swift and LLaMA-Factory ───────────────────────────────────────────────────────────────────


def swift_pair(row: Row, options: Options) -> Row:
    """Convert {messages, rejected_response or rejected_messages}; `messages` is chosen."""
    chosen = read_conversation(row)
    if row.get("rejected_messages"):
        rejected = read_messages(row["rejected_messages"], system_of(row), blank_end=True)
    elif are_texts(row["rejected_response"]) and chosen[-1]["role"] == "assistant":
        responses = [chosen[-1]["content"], *row["rejected_response"]]
        return {"prompt": chosen[:-1], "responses": responses, "ranks": [1, *(2 for _ in responses[1:])]}
    else:
        rejected = [*chosen[:-1], {"role": "assistant", "content": read_reply(row, "rejected_response", chosen[:-1])}]
    return judged_conversations(chosen, rejected, 0, margin=number(row.get("margin"), "margin"))


def are_texts(value: object) -> bool:
    """Return whether a value is a list of texts: several answers that are worse."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def swift_prompt(row: Row, options: Options) -> Row:
    """Take the conversation up to the last message of the user."""
    return {"prompt": shared_start([read_conversation(row)])}


def swift_query_pair(row: Row, options: Options) -> Row:
    """Convert {query, response, rejected_response} of older ms-swift."""
    pair = {"chosen": row["response"], "rejected": row["rejected_response"]}
    return ranking_from_pair(swift_query_prompt(row, options)["prompt"], pair, options)


def swift_query_prompt(row: Row, options: Options) -> Row:
    """Take the query, after the turns of `history`."""
    return {"prompt": read_instruction({**row, "instruction": row["query"]})}


def two_conversations(row: Row, options: Options) -> Row:
    """Convert {chosen_messages, rejected_messages}."""
    whole = [read_messages(row[key], blank_end=True) for key in ("chosen_messages", "rejected_messages")]
    return judged_conversations(whole[0], whole[1], 0)


def two_conversations_prompt(row: Row, options: Options) -> Row:
    """Take what both conversations begin with alike."""
    whole = [read_messages(row[key], blank_end=True) for key in ("chosen_messages", "rejected_messages")]
    return {"prompt": shared_start(whole)}


def old_output_pair(row: Row, options: Options) -> Row:
    """Convert {instruction, input?, output: [chosen, rejected]} of older LLaMA-Factory."""
    chosen, rejected = row["output"]
    return ranking_from_pair(read_instruction(row), {"chosen": chosen, "rejected": rejected}, options)


def is_pair_of_texts(row: Row) -> bool:
    """Return whether `output` is a list of two texts."""
    output = row["output"]
    return isinstance(output, list) and len(output) == 2 and all(isinstance(text, str) for text in output)


def instruction_prompt(row: Row, options: Options) -> Row:
    """Take the instruction."""
    return {"prompt": read_instruction(row)}


# ── pairs whose prompt or answers have other names ───────────────────────────────────────────────


def other_prompt_pair(row: Row, options: Options) -> Row:
    """Convert {input, chosen, rejected} and {query, chosen, rejected}."""
    return ranking_from_pair(asked_prompt(row, options)["prompt"], row, options)


def renamed_texts(row: Row, options: Options) -> Row:
    """Convert pairs whose answers have other names, as of RENAMED: the better answer first."""
    better, worse = next(names for names in RENAMED if names[0] in row and names[1] in row)
    return ranking_from_pair(
        asked_prompt(row, options)["prompt"], {**row, "chosen": row[better], "rejected": row[worse]}, options
    )


def asked_prompt(row: Row, options: Options) -> Row:
    """Take the prompt under any of its names, after the turns of `history`."""
    key = next(key for key in ASKED if key in row)
    if key == "instruction":
        return {"prompt": read_instruction(row)}
    return {"prompt": read_question(row, key)}


def is_asked(row: Row) -> bool:
    """Return whether a row has a prompt under one name; an instruction may have an input."""
    present = [key for key in ASKED if row.get(key) is not None]
    return len(present) == 1 or present == ["instruction", "input"]


def renamed_pair(row: Row, options: Options) -> Row:
    """Convert {prompt or instruction, chosen_response, rejected_response}."""
    pair = {**row, "chosen": row["chosen_response"], "rejected": row["rejected_response"]}
    if all(is_nemo(row[key]) or isinstance(row[key], str) for key in ("chosen_response", "rejected_response")):
        pair["chosen"], pair["rejected"] = (NEMO_END.sub("", pair[key]) for key in ("chosen", "rejected"))
    return ranking_from_pair(renamed_prompt(row, options)["prompt"], pair, options)


def renamed_prompt(row: Row, options: Options) -> Row:
    """Take `prompt`, which may be in NeMo's chat template, or `instruction`."""
    if is_nemo(row.get("prompt")):
        messages = split_nemo(row["prompt"])
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return {"prompt": messages}
    return {"prompt": read_prompt(row) if "prompt" in row else read_instruction(row)}


def question_pair(row: Row, options: Options) -> Row:
    """Convert {system?, question, chosen, rejected} of orca_dpo_pairs."""
    return ranking_from_pair(question_prompt(row, options)["prompt"], row, options)


def question_prompt(row: Row, options: Options) -> Row:
    """Take the question, with its system message."""
    return {"prompt": read_prompt(row, "question")}


def trajectory_pair(row: Row, options: Options) -> Row:
    """Convert {trajectory, chosen, rejected} of UltraInteract."""
    return ranking_from_pair(read_messages(row["trajectory"]), row, options)


def trajectory_prompt(row: Row, options: Options) -> Row:
    """Take the conversation."""
    return {"prompt": read_messages(row["trajectory"])}


def step_pair(row: Row, options: Options) -> Row:
    """Convert {prompt, full_chosen, full_rejected} of Math-Step-DPO.

    Its `chosen` and `rejected` are single steps after steps that the assistant has written already,
    so that the whole solutions are the answers.
    """
    return ranking_from_pair(
        read_prompt(row), {"chosen": row["full_chosen"], "rejected": row["full_rejected"]}, options
    )


def prompt_of(row: Row, options: Options) -> Row:
    """Take the prompt."""
    return {"prompt": read_prompt(row)}


def capybara_pair(row: Row, options: Options) -> Row:
    """Convert {conversation, chosen, rejected} of Capybara-DPO, two whole conversations."""

    theirs = replace(options, ignore=options.ignore | {"prompt"})
    return ranking_from_pair(capybara_prompt(row, options)["prompt"], row, theirs)


def capybara_prompt(row: Row, options: Options) -> Row:
    """Take what both conversations begin with alike."""
    return {"prompt": shared_start([read_messages(row[key], blank_end=True) for key in ("chosen", "rejected")])}


def ranked_completions(row: Row, options: Options) -> Row:
    """Convert {context, completions: [{rank, completion}]} of NeMo RL: the rank 0 is the best."""
    completions = parse_list(row, "completions")
    if any(not isinstance(one, dict) or "completion" not in one for one in completions):
        raise ValueError("'completions' holds something else than objects; expected {rank, completion}")
    prompt = context_prompt(row, options)["prompt"]
    ranks = [number(one.get("rank"), "rank") for one in completions]
    scores = [None if rank is None else -rank for rank in ranks]
    responses = [read_reply(one, "completion", prompt) for one in completions]
    return {"prompt": prompt, "responses": responses, "ranks": ranks_of_scores(scores)}


def scored_completions(row: Row, options: Options) -> Row:
    """Convert {contents, completions: [{score, completion}]} of Vertex AI."""
    completions = parse_list(row, "completions")
    prompt = contents_prompt(row, options)["prompt"]
    scores = [number(one.get("score"), "score") for one in completions]
    responses = [read_reply(one, "completion", prompt) for one in completions]
    ranks = ranks_of_scores(scores, options.tie_within)
    return {"prompt": prompt, "responses": responses, "ranks": ranks, "scores": scores}


def contents_prompt(row: Row, options: Options) -> Row:
    """Take the conversation that was answered."""
    return {"prompt": read_conversation(row)}


def are_completions_scored(row: Row) -> bool:
    """Return whether `completions` are objects {score, completion}."""
    value = row["completions"]
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "score" in one for one in value)


def context_prompt(row: Row, options: Options) -> Row:
    """Take `context`, a text or messages."""
    return {"prompt": read_messages(row["context"]) if isinstance(row["context"], list) else row["context"]}


def are_completions_ranked(row: Row) -> bool:
    """Return whether `completions` are objects with ranks."""
    value = row["completions"]
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "rank" in one for one in value)


# ── NeMo-Aligner: texts in its chat template ─────────────────────────────────────────────────────


def nemo_conversation(text: str) -> Messages:
    """Split a text of NeMo-Aligner; the marker at its end belongs to no message."""
    return split_nemo(NEMO_END.sub("", text))


def single_text(row: Row, options: Options) -> Row:
    """Refuse a single text: rankings are gathered from several."""
    raise LeftOut("a single answer")


def gather_pairs(rows: Sequence[tuple[str, Row]], options: Options) -> Iterator[tuple[str, Row | ValueError]]:
    """Make a ranking of every two lines {text}: the chosen conversation, then the rejected one."""
    if len(rows) % 2:
        raise ValueError(f"{len(rows)} texts, an odd number; expected the chosen and the rejected one in turn")
    for (location, chosen), (_, rejected) in zip(rows[::2], rows[1::2], strict=True):
        try:
            first, second = nemo_conversation(chosen["text"]), nemo_conversation(rejected["text"])
            item: Row | ValueError = judged_conversations(first, second, 0)
        except ValueError as reason:
            item = reason
        yield location, item


def gather_labels(rows: Sequence[tuple[str, Row]], options: Options) -> Iterator[tuple[str, Row | ValueError]]:
    """Make a ranking of the texts with the same prompt, by their first label, or by another one.

    Args:
        rows: The rows {text, label}; a label is a number, or a list of which -100 is not judged.
        options: `by` is the index of the label, from 0.
    """
    if options.by is not None and not options.by.isdigit():
        raise ValueError(f"by: '{options.by}' is no index of a label; give a number from 0")
    index = int(options.by or 0)
    by_prompt: dict[str, list[tuple[str, Messages, float | None]]] = {}
    for location, row in rows:
        try:
            messages, score = nemo_conversation(row["text"]), label_of(row["label"], index)
        except ValueError as error:
            yield location, error
            continue
        by_prompt.setdefault(prompt_key(messages[:-1]), []).append((location, messages, score))
    for answers in by_prompt.values():
        location, first, _ = answers[0]
        scores = [score for *_, score in answers]
        if len(answers) < 2:
            yield location, LeftOut("a prompt with a single answer")
            continue
        responses = [messages[-1]["content"] for _, messages, _ in answers]
        ranks = ranks_of_scores(scores, options.tie_within)
        yield location, {"prompt": first[:-1], "responses": responses, "ranks": ranks, "scores": scores}


def label_of(label: object, index: int) -> float | None:
    """Return a label, a number or one of a list; None for -100, which was not judged.

    Args:
        label: The value in the row.
        index: The index of the label, from 0.
    """
    labels = label if isinstance(label, list) else [label]
    if index >= len(labels):
        raise ValueError(f"by: {index} is none of {len(labels)} labels; give an index from 0")
    value = number(labels[index], "label")
    return None if value == -100 else value


def nemo_prompt(row: Row, options: Options) -> Row:
    """Take the conversation up to the last message of the user."""
    return {"prompt": shared_start([nemo_conversation(row["text"])])}


def is_nemo_text(row: Row) -> bool:
    """Return whether `text` is in NeMo's chat template."""
    return is_nemo(row["text"])


RENAMED = (
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("chosen_completion", "rejected_completion"),
    ("chosen_output", "rejected_output"),
    ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("pos_resp", "neg_resp"),
    ("response_w", "response_l"),
    ("y_w", "y_l"),
)
"""Other names of the better and the worse answer: of Chinese DPO sets, CValues, and papers."""
ASKED = ("prompt", "question", "query", "instruction", "input")
"""Names of the prompt of such a pair."""


def is_asked_by_it_alone(row: Row) -> bool:
    """Return whether `input` or `query` is the whole prompt, and not a part beside another key."""
    others = ("prompt", "question", "instruction", "messages", "conversations")
    return is_asked(row) and not any(key in row for key in others)


OTHER_PROMPT_PAIRS = tuple(
    Form(
        (key, "chosen", "rejected"),
        ("history", *SYSTEM_KEYS, *RANKING_KEYS, *SCORE_KEYS),
        other_prompt_pair,
        name="pairs under other names",
        fits=is_asked_by_it_alone,
        prompt=asked_prompt,
        harmless=POOL,
    )
    for key in ("input", "query")
)
RENAMED_PAIRS = OTHER_PROMPT_PAIRS + tuple(
    Form(
        names,
        (*ASKED, "history", *SYSTEM_KEYS, *RANKING_KEYS, *SCORE_KEYS),
        renamed_texts,
        name="pairs under other names",
        fits=is_asked,
        prompt=asked_prompt,
    )
    for names in RENAMED
)
SERVICE_PAIR = Form(
    ("input", "preferred_output", "non_preferred_output"),
    (),
    service_pair,
    name="OpenAI's preferences",
    prompt=service_prompt,
)
SWIFT_PAIR = Form(
    ("messages", "rejected_response"), (*SYSTEM_KEYS, "margin"), swift_pair, name="ms-swift", prompt=swift_prompt
)
SWIFT_MESSAGES = Form(
    ("messages", "rejected_messages"), (*SYSTEM_KEYS, "margin"), swift_pair, name="ms-swift", prompt=swift_prompt
)
SWIFT_QUERY = Form(
    ("query", "response", "rejected_response"),
    (*SYSTEM_KEYS, "history"),
    swift_query_pair,
    name="ms-swift",
    prompt=swift_query_prompt,
)
TWO_CONVERSATIONS = Form(
    ("chosen_messages", "rejected_messages"),
    (),
    two_conversations,
    name="LLaMA-Factory v1",
    prompt=two_conversations_prompt,
)
OLD_OUTPUT_PAIR = Form(
    ("instruction", "output"),
    INSTRUCTION_KEYS,
    old_output_pair,
    name="LLaMA-Factory's old pairs",
    fits=is_pair_of_texts,
    prompt=instruction_prompt,
)
RENAMED_PAIR = Form(
    ("chosen_response", "rejected_response"),
    ("prompt", *INSTRUCTION_KEYS, "instruction"),
    renamed_pair,
    name="NeMo pairs",
    fits=lambda row: "prompt" in row or "instruction" in row,
    prompt=renamed_prompt,
)
QUESTION_PAIR = Form(
    ("question", "chosen", "rejected"),
    SYSTEM_KEYS,
    question_pair,
    name="orca_dpo_pairs",
    fits=lambda row: "prompt" not in row,
    prompt=question_prompt,
)
TRAJECTORY_PAIR = Form(
    ("trajectory", "chosen", "rejected"), (), trajectory_pair, name="UltraInteract", prompt=trajectory_prompt
)
STEP_PAIR = Form(
    ("prompt", "full_chosen", "full_rejected"),
    ("chosen", "rejected"),
    step_pair,
    name="Math-Step-DPO",
    prompt=prompt_of,
)
CAPYBARA_PAIR = Form(
    ("conversation", "chosen", "rejected"),
    ("prompt",),
    capybara_pair,
    name="Capybara-DPO",
    fits=lambda row: isinstance(row["chosen"], list) and isinstance(row["rejected"], list),
    prompt=capybara_prompt,
)
RANKED_COMPLETIONS = Form(
    ("context", "completions"),
    (),
    ranked_completions,
    name="NeMo RL",
    fits=are_completions_ranked,
    prompt=context_prompt,
)
SCORED_COMPLETIONS = Form(
    ("contents", "completions"),
    SYSTEM_KEYS,
    scored_completions,
    name="Vertex AI's preferences",
    fits=are_completions_scored,
    prompt=contents_prompt,
)
NEMO_LABELS = Form(
    ("text", "label"),
    (),
    single_text,
    name="NeMo-Aligner's labels",
    fits=is_nemo_text,
    by=("0", "*"),
    gather=gather_labels,
    prompt=nemo_prompt,
)
NEMO_PAIRS = Form(
    ("text",), (), single_text, name="NeMo-Aligner's pairs", fits=is_nemo_text, gather=gather_pairs, prompt=nemo_prompt
)
CHAT_TOOLS = (
    SERVICE_PAIR,
    SWIFT_PAIR,
    SWIFT_MESSAGES,
    SWIFT_QUERY,
    TWO_CONVERSATIONS,
    OLD_OUTPUT_PAIR,
    RENAMED_PAIR,
    QUESTION_PAIR,
    TRAJECTORY_PAIR,
    STEP_PAIR,
    CAPYBARA_PAIR,
    RANKED_COMPLETIONS,
    SCORED_COMPLETIONS,
    NEMO_LABELS,
    NEMO_PAIRS,
)
