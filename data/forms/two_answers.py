"""Convert data sets that compare two answers, each in its own words."""

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.instructions import read_instruction
from data.forms.judged import NO_PREFERENCE, choice, judged_pair, kind_of, number, rated_pair_scores
from data.forms.messages import from_text, read_messages, read_prompt
from data.forms.scores import ranks_of_scores
from data.parsing import describe, parse_text

SUMMARY_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
"""The request for a summary (Stiennon et al. 2020, appendix C)."""
ARTICLE_PROMPT = "{article}\n\nTL;DR:"
"""The same for news."""

# ── PKU-SafeRLHF and Stanford Human Preferences ──────────────────────────────────────────────────


def safe_pair(row: Row, options: Options) -> Row:
    """Convert {prompt, response_0, response_1, better_response_id, safer_response_id}."""
    by = options.by or "better"
    key = f"{by}_response_id"
    if key not in row:
        raise ValueError(f"the key '{key}' is missing; say by: {'safer' if by == 'better' else 'better'} in the source")
    better = choice(row[key], key, (0, 1, -1))
    if better not in (0, 1):
        raise LeftOut(NO_PREFERENCE)
    return judged_pair(row["prompt"], [row["response_0"], row["response_1"]], better)


def votes_pair(row: Row, options: Options) -> Row:
    """Convert SHP's {history, human_ref_A, human_ref_B, labels}: 1 if A has more votes."""
    votes = rated_pair_scores(row, ("score_A", "score_B"))
    ratio = number(row.get("score_ratio"), "score_ratio")
    if ratio is None and votes is not None and min(votes) > 0:
        ratio = max(votes) / min(votes)
    if ratio is None and options.min_score_ratio > 1:
        raise ValueError("the row has no score_ratio; take min_score_ratio out of the source")
    # Where the votes are not positive a ratio says nothing, and may be below 1.
    if options.min_score_ratio > 1 and ratio is not None and ratio < options.min_score_ratio:
        raise LeftOut(f"a pair whose votes differ by less than min_score_ratio {options.min_score_ratio:g}")
    label = choice(row["labels"], "labels", (0, 1))
    if label is None:
        raise LeftOut(NO_PREFERENCE)
    better = 1 - label  # 1 says that A, the first one, is better
    if votes is not None and votes[better] < votes[1 - better]:
        raise ValueError("'labels' and the scores contradict each other; correct one of them")
    answers = [row["human_ref_A"], row["human_ref_B"]]
    return judged_pair(row["history"], answers, better, kind=kind_of(row.get("domain")))


def votes_prompt(row: Row, options: Options) -> Row:
    """Take SHP's post."""
    return {"prompt": row["history"]}


# ── summaries and web answers of OpenAI ──────────────────────────────────────────────────────────


def summary_prompt(row: Row, options: Options) -> Row:
    """Write the request for a summary of a post, or of an article."""
    info = row["info"]
    if not isinstance(info, dict):
        raise ValueError(f"'info' is {describe(info)}; expected {{post, title, subreddit}}")
    if info.get("post") in (None, ""):
        return {"prompt": ARTICLE_PROMPT.format(article=parse_text(info, "article"))}
    parts = {key: str(info.get(key) or "").strip() for key in ("subreddit", "title")}
    return {"prompt": SUMMARY_PROMPT.format(post=parse_text(info, "post").strip(), **parts)}


def summary_pair(row: Row, options: Options) -> Row:
    """Convert {info, summaries, choice, worker, extra}."""
    summaries = row["summaries"]
    if not isinstance(summaries, list) or any(not isinstance(one, dict) for one in summaries):
        raise ValueError(f"'summaries' is {describe(summaries)}; expected a list of {{text}}")
    if len(summaries) != 2:
        raise ValueError(f"'summaries' has {len(summaries)} entries; expected 2")
    better = choice(row["choice"], "choice", (0, 1))
    if better is None:
        raise LeftOut(NO_PREFERENCE)
    extra = row.get("extra")
    confidence = extra.get("confidence") if isinstance(extra, dict) else None
    return judged_pair(
        summary_prompt(row, options)["prompt"],
        [parse_text(one, "text").strip() for one in summaries],
        better,
        labeler=row.get("worker"),
        meta=None if confidence is None else {"confidence": confidence},
    )


def summary_axes(row: Row, options: Options) -> Row:
    """Leave out a single summary that was rated for its own."""
    raise LeftOut("a single summary rated on axes; the comparisons are another file")


def web_prompt(row: Row, options: Options) -> Row:
    """Take the question, a text or {full_text}."""
    question = from_text(row["question"]) if str(row["question"]).startswith(("{'", '{"')) else row["question"]
    return {"prompt": question.get("full_text") if isinstance(question, dict) else question}


def web_pair(row: Row, options: Options) -> Row:
    """Convert webgpt's {question, answer_0, answer_1, score_0, score_1}; scores of 0 are a tie."""
    scores = rated_pair_scores(row, ("score_0", "score_1"))
    if scores is None:
        raise LeftOut(NO_PREFERENCE)
    ranks = ranks_of_scores(scores, options.tie_within)
    answers = [row["answer_0"], row["answer_1"]]
    return {**web_prompt(row, options), "responses": answers, "ranks": ranks, "scores": scores}


# ── AlpacaEval, AlpacaFarm and other judges ──────────────────────────────────────────────────────


def alpaca_pair(row: Row, options: Options) -> Row:
    """Convert {instruction, input?, output_1, output_2, preference}.

    A preference of 1 is for the first, of 2 for the second; between them the nearer one wins, and
    1.5 is a tie, as is 0 in older files.
    """
    preference = number(row.get("preference"), "preference")
    if preference is None:
        raise LeftOut(NO_PREFERENCE)
    if preference != 0 and not 1 <= preference <= 2:
        raise ValueError(f"'preference' is {preference:g}; expected 1 (output_1 is better) to 2 (output_2 is)")
    middle = preference in (0, 1.5) or abs(2 * preference - 3) <= options.tie_within
    better = None if middle else 0 if preference < 1.5 else 1
    answers = [row["output_1"], row["output_2"]]
    return judged_pair(read_instruction(row), answers, better, labeler=row.get("annotator"), kind=row.get("dataset"))


def labelled_pair(row: Row, options: Options) -> Row:
    """Convert {instruction, output_1, output_2, label}: 1 or 2."""
    better = choice(row["label"], "label", (1, 2))
    if better is None:
        raise LeftOut(NO_PREFERENCE)
    return judged_pair(read_instruction(row), [row["output_1"], row["output_2"]], better)


def instruction_prompt(row: Row, options: Options) -> Row:
    """Take the instruction."""
    return {"prompt": read_instruction(row)}


def feedback_pair(row: Row, options: Options) -> Row:
    """Convert HALOs' {prompt or instruction, output_A, output_B, label}: 1 if A is better."""
    label = choice(row["label"], "label", (0, 1))
    if label is None:
        raise LeftOut(NO_PREFERENCE)
    scores = rated_pair_scores(row, ("reward_A", "reward_B"))
    answers = [single_text(row[key], key) for key in ("output_A", "output_B")]
    better = 1 - label
    if scores is not None and scores[better] < scores[1 - better]:
        raise ValueError("'label' and the rewards contradict each other; correct one of them")
    return judged_pair(feedback_prompt(row, options)["prompt"], answers, better, scores=scores)


def feedback_prompt(row: Row, options: Options) -> Row:
    """Take the prompt of HALOs, a text or messages."""
    return {"prompt": read_prompt(row) if "prompt" in row else read_instruction(row)}


def single_text(value: object, key: str) -> object:
    """Return an answer that is a text, or a list with the assistant's message."""
    if not isinstance(value, list):
        return value
    messages = read_messages(value, blank_end=True)
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(f"'{key}' holds more than one answer; expected one message of the assistant")
    return messages[0]["content"]


def letter_pair(row: Row, options: Options) -> Row:
    """Convert Prometheus' {orig_instruction, orig_response_A, orig_response_B, orig_preference}."""
    better = {"A": 0, "B": 1}.get(str(row["orig_preference"]).strip().upper())
    if better is None:
        raise ValueError(f"'orig_preference' is {describe(row['orig_preference'])}; expected A or B")
    return judged_pair(row["orig_instruction"], [row["orig_response_A"], row["orig_response_B"]], better)


def letter_prompt(row: Row, options: Options) -> Row:
    """Take the instruction that both answers follow."""
    return {"prompt": row["orig_instruction"]}


def verdict_pair(row: Row, options: Options) -> Row:
    """Convert JudgeBench's {question, response_A, response_B, label}: A>B, B>A or A=B."""
    verdicts = {"A>B": 0, "B>A": 1, "A=B": None}
    label = str(row["label"]).replace(" ", "").upper()
    if label not in verdicts:
        raise ValueError(f"'label' is {describe(row['label'])}; expected A>B, B>A or A=B")
    return judged_pair(row["question"], [row["response_A"], row["response_B"]], verdicts[label])


def overall_pair(row: Row, options: Options) -> Row:
    """Convert align-anything's {question, response_1, response_2, overall_response}: 1 or 2."""
    better = choice(row["overall_response"], "overall_response", (1, 2))
    if better is None:
        raise LeftOut(NO_PREFERENCE)
    return judged_pair(overall_prompt(row, options)["prompt"], [row["response_1"], row["response_2"]], better)


def overall_prompt(row: Row, options: Options) -> Row:
    """Take the question, under either name."""
    return {"prompt": row["question"] if "question" in row else row["prompt"]}


def question_prompt(row: Row, options: Options) -> Row:
    """Take the question."""
    return {"prompt": row["question"]}


# ── answers under other names, the better one first ──────────────────────────────────────────────


def votes_of_exchange(row: Row, options: Options) -> Row:
    """Convert {question, response_j, response_k}: j has more votes."""
    return judged_pair(row["question"], [row["response_j"], row["response_k"]], 0)


def accepted_pair(row: Row, options: Options) -> Row:
    """Convert {input, accepted, rejected}."""
    return judged_pair(row["input"], [row["accepted"], row["rejected"]], 0)


def accepted_prompt(row: Row, options: Options) -> Row:
    """Take the request."""
    return {"prompt": row["input"]}


SAFE_PAIR = Form(
    ("prompt", "response_0", "response_1"),
    ("better_response_id", "safer_response_id"),
    safe_pair,
    name="PKU-SafeRLHF",
    fits=lambda row: "better_response_id" in row or "safer_response_id" in row,
    by=("better", "safer"),
    prompt=lambda row, options: {"prompt": row["prompt"]},
)
VOTES_PAIR = Form(
    ("history", "human_ref_A", "human_ref_B", "labels"),
    ("score_A", "score_B", "score_ratio", "domain"),
    votes_pair,
    name="SHP",
    has_votes=True,
    prompt=votes_prompt,
)
SUMMARY_PAIR = Form(
    ("info", "summaries", "choice"), ("worker", "extra"), summary_pair, name="TL;DR comparisons", prompt=summary_prompt
)
SUMMARY_AXES = Form(("info", "summary", "worker"), (), summary_axes, name="TL;DR axes", prompt=summary_prompt)
WEB_PAIR = Form(
    ("question", "answer_0", "answer_1", "score_0", "score_1"), (), web_pair, name="webgpt", prompt=web_prompt
)
ALPACA_PAIR = Form(
    ("instruction", "output_1", "output_2"),
    ("preference", "input", "annotator", "dataset"),
    alpaca_pair,
    name="AlpacaEval and AlpacaFarm",
    fits=lambda row: "label" not in row,
    prompt=instruction_prompt,
    has_degrees=True,
)
LABELLED_PAIR = Form(
    ("instruction", "output_1", "output_2", "label"),
    ("input",),
    labelled_pair,
    name="OffsetBias",
    prompt=instruction_prompt,
)
FEEDBACK_PAIR = Form(
    ("output_A", "output_B", "label"),
    ("prompt", "instruction", "reward_A", "reward_B"),
    feedback_pair,
    name="HALOs",
    fits=lambda row: "prompt" in row or "instruction" in row,
    prompt=feedback_prompt,
)
LETTER_PAIR = Form(
    ("orig_instruction", "orig_response_A", "orig_response_B", "orig_preference"),
    (),
    letter_pair,
    name="Prometheus preferences",
    prompt=letter_prompt,
)
VERDICT_PAIR = Form(
    ("question", "response_A", "response_B", "label"), (), verdict_pair, name="JudgeBench", prompt=question_prompt
)
OVERALL_PAIR = Form(
    ("response_1", "response_2", "overall_response"),
    ("question", "prompt"),
    overall_pair,
    name="align-anything",
    fits=lambda row: "question" in row or "prompt" in row,
    prompt=overall_prompt,
)
EXCHANGE_PAIR = Form(
    ("question", "response_j", "response_k"),
    (),
    votes_of_exchange,
    name="stack-exchange-paired",
    prompt=question_prompt,
)
ACCEPTED_PAIR = Form(
    ("input", "accepted", "rejected"), (), accepted_pair, name="Code-Preference-Pairs", prompt=accepted_prompt
)
TWO_ANSWERS = (
    SAFE_PAIR,
    VOTES_PAIR,
    SUMMARY_PAIR,
    SUMMARY_AXES,
    WEB_PAIR,
    ALPACA_PAIR,
    LABELLED_PAIR,
    FEEDBACK_PAIR,
    LETTER_PAIR,
    VERDICT_PAIR,
    OVERALL_PAIR,
    EXCHANGE_PAIR,
    ACCEPTED_PAIR,
)
