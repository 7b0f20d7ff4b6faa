"""What a file of data is, before anything trains on it: `rlhf data check FILE [-c CONFIG]`; or what all
data of a config are, without a FILE.

Kind and forms, lengths, duplicates, what rankings hold, prompts shared with other files word by word or
nearly so, what a length limit would do, and every error that reading it would raise. Reader and token
counts are those of training.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from pathlib import Path

from data import records, room
from data.agreement import compare, remedy
from data.encode import encode_prompt, encode_response, end_of_turn, equal_pairs
from data.error_lines import shorten
from data.near_copies import nearest_copies
from data.records import Document, Prompt, Ranking, Reading, judged_pairs, prompt_key
from data.sources import FORMS, RECORD, Loaded, file_rows, first_line, read, recognise
from data.template_text import with_variables
from data.templates import TemplateOverrun
from pipeline.errors import UserError

TRAINING = ("rankings", "demonstrations", "documents", "prompts")  # these may share prompts among themselves
NAMED = 20  # places that are named at most
READERS = {  # the sections of the config whose length limits hold for a kind
    "documents": ("base",),
    "demonstrations": ("sft",),
    "rankings": ("rm", "dpo"),
    "prompts": ("ppo",),
    "evaluation_prompts": ("evaluate",),
}


@dataclass(frozen=True)
class Part:
    """What a config takes of a source: so many records after the first ones; hub: of a data set on the Hub."""

    skip: int = 0
    limit: int | None = None
    hub: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


@dataclass
class Report:
    """facts: (what, how many), in order; errors: lines "FILE:LINE: what is wrong; what would be right"."""

    path: Path
    kind: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The facts as a table of two columns, and the number of errors under it."""
        verdict = ("errors", str(len(self.errors)) if self.errors else "none")
        rows = [("file", str(self.path)), ("kind", self.kind or "not recognised"), *self.facts, verdict]
        width = max(len(label) for label, _ in rows)
        return [f"{label:<{width}}  {text}" for label, text in rows]


def check(
    path: str | Path,
    kind: str | None = None,
    tokenizer=None,
    max_length: int | None = None,
    on_too_long: str | None = "error",
    against: list[tuple] | None = None,
    part: Part | None = None,
    response_length: int | None = None,
) -> Report:
    """Look through a file as `kind`, or as what its keys say. Lengths: tokens, or words without a tokenizer.

    max_length (tokens), on_too_long: of the section that reads this kind; for prompts without the response.
    against: (kind or other name, file, and perhaps the part of it that is read) of data that may not share prompts with
    this file. part: which part of this file is read; None: all of it.
    response_length: of ppo, which demonstrations' answers are compared with.
    """
    report = Report(Path(path), kind or guess_kind(path))
    if report.kind is None:
        reading = Reading()
        first = next((f"{where}: {named_keys(value)}" for where, value in file_rows(path, reading)), "")
        report.errors += reading.errors or [first]
        return report
    loaded = read_part(report.kind, path, part)
    report.errors += loaded.errors
    say_rows(report, loaded)
    if part is not None and (part.skip or part.limit is not None) and loaded.records:
        report.facts.append(("taken", f"records {part.skip + 1:,} to {part.skip + len(loaded.records):,}"))
    if loaded.records:
        say_lengths(report, loaded, tokenizer, max_length, on_too_long)
        if report.kind == "demonstrations" and tokenizer is not None and response_length is not None:
            say_room(report, loaded, tokenizer, response_length)
        say_agreement(report, loaded, tokenizer)
        say_duplicates(report, loaded)
        if report.kind == "rankings":
            say_pairs(report, loaded, tokenizer, max_length, on_too_long)
        for name, other, *rest in against or []:
            say_shared_prompts(report, loaded, name, other, *rest)
    return report


def read_part(kind: str, path: str | Path, part: Part | None) -> Loaded:
    """Read what a config takes of a file, or of a data set on the Hub; without `part` the whole file."""
    if part is None:
        return read(kind, path)
    most = None if part.limit is None else part.skip + part.limit
    place = {"path": path} if part.hub is None else {"hub": part.hub, "split": part.split, "subset": part.subset}
    loaded = read(kind, **place, limit=most, **({} if part.hub is None else {"revision": part.revision}))
    if part.skip >= len(loaded.records) and not loaded.errors:
        what = f"holds {len(loaded.records)} records and skip passes over {part.skip}; lower skip"
        loaded.errors.append(f"{part.hub or path}: {what}")
    return replace(loaded, records=loaded.records[part.skip :], wheres=loaded.wheres[part.skip :])


def guess_kind(path: str | Path) -> str | None:
    """The kind whose keys the first 50 rows have: a kind in the file's name if all do, else the most specific one.

    Damaged rows have the keys of their kind too, so only between kinds of the same keys do whole rows decide.
    """
    in_name = [kind for kind in ("evaluation_prompts", *TRAINING) if kind in Path(path).stem]
    rows = [value for _, value in islice(file_rows(path, Reading()), 50)]
    known, keys, whole = Counter(), Counter(), Counter()
    for value in rows:
        for kind in dict.fromkeys([*in_name, *TRAINING]):
            try:
                form, row = recognise(kind, value)
                known[kind] += 1
                keys[kind] += len(form.needs)
                RECORD[kind](form.convert(row))
                whole[kind] += 1
            except ValueError:
                pass
    if named := [kind for kind in in_name if known[kind] == len(rows) > 0]:
        return named[0]
    return max(TRAINING, key=lambda kind: (keys[kind], whole[kind])) if known else None


def named_keys(value: object) -> str:
    """Why a row is of no kind."""
    found = f"the keys {', '.join(value)}" if isinstance(value, dict) else records.named(value)
    known = "; ".join(f"{kind} {' or '.join(map(str, FORMS[kind]))}" for kind in TRAINING)
    return f"{found} are no known kind of row; known are {known}"


def say_rows(report: Report, loaded: Loaded) -> None:
    blanks = f" · {loaded.blanks:,} blank lines skipped" if loaded.blanks else ""
    report.facts.append(("rows", f"{loaded.forms.total():,}{blanks}"))
    report.facts += [("form", f"{form}: {n:,} rows") for form, n in loaded.forms.most_common()]
    if loaded.unread:
        keys = ", ".join(f"{key} ({n:,})" for key, n in sorted(loaded.unread.items()))
        report.facts.append(("keys not read", keys))


# ── lengths ─────────────────────────────────────────────────────────────────────────────────────────────────


def say_lengths(report: Report, loaded: Loaded, tokenizer, limit: int | None, on_too_long: str | None):
    sizes, refused = [], []
    for record, where in zip(loaded.records, loaded.wheres, strict=True):
        try:
            sizes.append(row_lengths(record, tokenizer))
        except UserError as fault:  # the chat template does not take this prompt
            refused.append(f"{where}: {fault}")
    if refused:
        report.errors += refused
        return
    unit = "tokens" if tokenizer is not None else "words"
    for part in sizes[0]:
        report.facts.append((f"{part} length", spread([n for size in sizes for n in size[part]], unit)))
    if limit is None or on_too_long is None:
        return
    if report.kind == "documents":
        report.facts.append(("too long", f"none can be: packed end to end into rows of {limit} tokens"))
        return
    if tokenizer is None:
        report.facts.append(("too long", f"not counted: the limit is {limit} tokens, no tokenizer here"))
        return
    totals = [sum(max(lengths) for lengths in size.values()) for size in sizes]  # the longest response counts
    over = [i for i, total in enumerate(totals) if total > limit]
    dropped = [i for i in over if on_too_long == "drop" or sizes[i]["prompt"][0] >= limit]
    if on_too_long == "error":
        text = f"{len(over):,} refused"
        what = f"tokens, the limit is {limit}; shorten it, raise max_length, or on_too_long: drop or truncate"
        report.errors += [f"{loaded.wheres[i]}: {totals[i]} {what}" for i in over]
    elif on_too_long == "drop":
        text = f"{len(dropped):,} dropped"
    else:
        text = f"{len(over) - len(dropped):,} lose their end and EOS, {len(dropped):,} dropped (no room)"
    if on_too_long != "error" and len(dropped) == len(sizes):
        report.errors.append(f"{report.path}: no row is left within {limit} tokens; raise max_length")
    first = f" · the first at {loaded.wheres[over[0]]}" if over else ""
    report.facts.append(("too long", f"{text} · limit {limit} tokens, on_too_long: {on_too_long}{first}"))


def say_room(report: Report, loaded: Loaded, tokenizer, response_length: int) -> None:
    """Say how many of the answers PPO would have no room for."""
    marks = room.quantiles([len(encode_response(tokenizer, record.completion)) for record in loaded.records])
    text = room.warning(marks, response_length) or f"answers have {room.describe(marks, response_length)}"
    report.facts.append(("room in ppo", text))


def row_lengths(record, tokenizer) -> dict[str, list[int]]:
    """{part of the row: the length of each such part}, template and EOS included when counted in tokens."""

    def of_text(text: str, finished: bool = True) -> int:
        return len(text.split()) if tokenizer is None else len(encode_response(tokenizer, text, finished))

    if isinstance(record, Document):
        return {"document": [of_text(record.text)]}
    if tokenizer is None:
        prompt = sum(of_text(message["content"]) for message in records.as_messages(record.prompt))
    else:
        prompt = len(encode_prompt(tokenizer, record.prompt))
    if isinstance(record, Prompt):
        return {"prompt": [prompt]}
    if isinstance(record, Ranking):
        return {"prompt": [prompt], "response": [of_text(*answer) for answer in record.answers]}
    return {"prompt": [prompt], "completion": [of_text(record.completion)]}


def spread(lengths: list[int], unit: str) -> str:
    lengths = sorted(lengths)
    middle, most = (lengths[math.ceil(share * len(lengths)) - 1] for share in (0.5, 0.95))
    return f"{lengths[0]:,} to {lengths[-1]:,} {unit} · median {middle:,} · 95 % up to {most:,}"


def say_agreement(report: Report, loaded: Loaded, tokenizer) -> None:
    """Report whether rows begin what the chat template writes of the whole conversation (data/agreement.py)."""
    if tokenizer is None or report.kind not in ("demonstrations", "rankings"):
        return
    rows, names = [], []
    for record, where in zip(loaded.records, loaded.wheres, strict=True):
        answers = record.answers if isinstance(record, Ranking) else [(record.completion,)]
        rows += [(record.prompt, *answer) for answer in answers]
        names += [where] * len(answers)
    try:
        found = compare(tokenizer, rows, names)
    except TemplateOverrun:  # which the lengths have told
        return
    text = found.text("answers" if report.kind == "rankings" else "rows")
    report.facts.append(("chat template", f"{text}; {remedy(tokenizer)}" if found.differ else text))


# ── duplicates, pairs, leaks ────────────────────────────────────────────────────────────────────────────────


def say_duplicates(report: Report, loaded: Loaded) -> None:
    if RECORD[report.kind] is RECORD["prompts"]:
        report.facts.append(("duplicates", f"{loaded.duplicates:,} prompts, left out"))
        return
    rows = {json.dumps(records.to_json(record) | {"id": ""}, sort_keys=True) for record in loaded.records}
    text = f"{len(loaded.records) - len(rows):,} rows"
    if report.kind != "documents":
        text += f" · {len(loaded.records) - len(prompts_of(loaded)):,} prompts that came before"
    report.facts.append(("duplicates", text + ", kept"))


def say_pairs(report: Report, loaded: Loaded, tokenizer, limit: int | None, on_too_long: str | None) -> None:
    """K, cut responses, the C(K,2) pairs by verdict, those that are equal within `limit` tokens, and where the labelers
    contradict each other."""
    rankings = loaded.records
    sizes = Counter(len(ranking.responses) for ranking in rankings)
    report.facts.append(("K", " · ".join(f"{k}: {n:,} rows" for k, n in sorted(sizes.items()))))
    ends = [ended for ranking in rankings for ended in ranking.finished or ()]
    if ends:
        text = f"{ends.count(False):,} of {len(ends):,} responses were cut off: taught without EOS"
        report.facts.append(("unfinished", text))
    if names := {ranking.labeler for ranking in rankings if ranking.labeler is not None}:
        report.facts.append(("labelers", f"{len(names):,}"))
    verdicts, votes, better = Counter(), defaultdict(list), defaultdict(dict)
    for ranking in rankings:
        prompt, answers, pairs = prompt_key(ranking.prompt), ranking.answers, list(judged_pairs(ranking))
        verdicts.update(verdict for *_, verdict in pairs)
        for winner, loser in {(answers[i], answers[j]) for i, j, verdict in pairs if verdict == "usable"}:
            votes[prompt, frozenset((winner, loser))].append(winner)
            better[prompt].setdefault(loser, set()).add(winner)
    others = " · ".join(f"{verdicts[v]:,} {v}" for v in ("tie", "unjudged", "identical"))
    cut = tokenizer is not None and limit is not None and on_too_long == "truncate" and not report.errors
    equal = equal_within(loaded, tokenizer, limit) if cut else []
    usable = verdicts["usable"] - sum(count for _, count in equal)
    if equal:
        others += f" · {verdicts['usable'] - usable:,} equal within {limit} tokens"
    report.facts.append(("pairs", f"{usable:,} usable of {verdicts.total():,} · {others}"))
    if equal:
        named = ", ".join(f"{where} ({count:,})" if count > 1 else where for where, count in equal[:NAMED])
        more = f" and {len(equal) - NAMED:,} more rows" if len(equal) > NAMED else ""
        report.facts.append(("equal within", f"{limit} tokens, and so left out: at {named}{more}"))
    again = [winners for winners in votes.values() if len(winners) > 1]
    split = sum(len(set(winners)) > 1 for winners in again)
    circles = sum(goes_round(graph) for graph in better.values())
    text = f"{split:,} of {len(again):,} pairs judged more than once · {circles:,} prompts ranked in a circle"
    report.facts.append(("contradictions", text))


def equal_within(loaded: Loaded, tokenizer, limit: int) -> list[tuple[str, int]]:
    """Return (place, pairs) of rankings with pairs that differ behind the limit alone, where long rows are cut."""
    found = []
    for record, where in zip(loaded.records, loaded.wheres, strict=True):
        responses = [encode_response(tokenizer, *answer) for answer in record.answers]
        room = limit - len(encode_prompt(tokenizer, record.prompt))
        if room < 1 or max(map(len, responses)) <= room:
            continue  # left out as a whole, or not cut
        if count := equal_pairs(record, [response[:room] for response in responses]):
            found.append((where, count))
    return found


def goes_round(better: dict[tuple, set[tuple]]) -> bool:
    """Whether a response is by some steps better than itself. better: response → those that beat it."""
    try:
        TopologicalSorter(better).prepare()
    except CycleError:
        return True
    return False


def say_shared_prompts(report: Report, loaded: Loaded, name: str, other: str | Path, part: Part | None = None) -> None:
    """Report the prompts of this file that stand in another one too.

    Training data may share prompts with training data. With anything else a shared prompt is an
    error, and near copies are looked for too: counted apart, for a person to judge.
    """
    kind = name if name in FORMS else guess_kind(other)
    if kind is None or "documents" in (kind, report.kind):
        return
    theirs = read_part(kind, other, part)
    seen, keys = prompts_of(theirs), keys_of(loaded)
    shared = [i for i, key in enumerate(keys) if key in seen]
    unread = f" ({len(theirs.errors):,} errors in it: check it too)" if theirs.errors else ""
    report.facts.append((f"also in {name}", f"{len(shared):,} of {len(loaded.records):,} prompts{unread}"))
    if name in TRAINING and report.kind in TRAINING:
        return
    for i in shared:
        what = f"this prompt is at {seen[keys[i]]} ({name}) too: a leak"
        report.errors.append(f"{loaded.wheres[i]}: {what}; remove it from one of the two")
    rest = [i for i, key in enumerate(keys) if key not in seen]
    nearest = nearest_copies([loaded.records[i].prompt for i in rest], [record.prompt for record in theirs.records])
    near = [(i, place) for i, place in zip(rest, nearest, strict=True) if place is not None]
    text = f"{len(near):,} of {len(loaded.records):,} prompts are in {name} but for a few words"
    if near:
        i, place = near[0]
        text += f" · the first at {loaded.wheres[i]}, of {theirs.wheres[place]}"
    report.facts.append(("near copies", text))


def keys_of(loaded: Loaded) -> list[str]:
    return [prompt_key(record.prompt) for record in loaded.records]


def prompts_of(loaded: Loaded) -> dict[str, str]:
    """Prompt → the last place where it stands."""
    return dict(zip(keys_of(loaded), loaded.wheres, strict=True))


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────


def run(path, kind: str | None, experiment, console=None, artifacts: str | Path = "artifacts") -> int:
    """Print the report; the exit code is 2 if there are errors. experiment: None, or a validated config.

    With a config, the limits of its sections hold, its evaluation prompts may stand in no other of its files,
    and lengths are in tokens if the tokenizer lies on this machine. artifacts: the folder of all experiments.
    """
    path, limits, note = Path(path).expanduser(), {}, None
    if experiment is not None:
        home = Path(artifacts) / experiment.name
        files, parts = files_of(experiment, home), parts_of(experiment)
        same = [name for name, file in files.items() if path.exists() and file.samefile(path)]
        kind = kind or (same[0] if same else guess_kind(path))
        limits = limits_of(experiment, kind)
        limits["against"] = [(name, file, parts[name]) for name, file in files.items() if name != kind]
        limits["part"] = parts[kind] if kind in same else None
        limits["tokenizer"], note = tokenizer_of(experiment, home)
    report = check(path, kind, **limits)
    if note:
        report.facts.append(("tokenizer", note))
    say(report, console)
    return 2 if report.errors else 0


def say(report: Report, console=None) -> None:
    """Print a report, and its errors to stderr."""
    for line in report.lines():
        print(line, file=console.file if console is not None else sys.stdout, flush=True)  # no markup, no wrapping
    for line in shorten(report.errors):
        print(f"error: {line}", file=sys.stderr)


def run_all(experiment, console=None, artifacts: str | Path = "artifacts") -> int:
    """Print a report of each kind of data that a config names, and what came of all.

    Args:
        experiment: the validated config.
        console: where to; by default standard output.
        artifacts: the folder of all experiments, where the embedded world's data and the tokenizer are.

    Returns:
        2 if there are errors in any, otherwise 0.

    Raises:
        UserError: The config names no data.
    """
    out = console.file if console is not None else sys.stdout
    home = Path(artifacts) / experiment.name
    files, parts, wrong = files_of(experiment, home), parts_of(experiment), {}
    tokenizer, note = tokenizer_of(experiment, home)
    print(f"tokenizer: {note}", file=out)
    if not parts:
        what = "names no file and no Hub id, so no stage has anything to read"
        raise UserError([f"data: {what}; name demonstrations, and what else the stages are to read"])
    for kind, part in parts.items():
        print(f"\n-- data.{kind}", file=out)
        place = place_of(experiment, kind)
        if place == "world" and kind not in files:
            print("written by the stage world, which has not run yet", file=out)
            continue
        others = [(name, file, parts[name]) for name, file in files.items() if name != kind]
        limits = limits_of(experiment, kind) | {"against": others, "tokenizer": tokenizer, "part": part}
        report = check(files.get(kind, Path(place).expanduser()), kind, **limits)
        say(report, console)
        if report.errors:
            wrong[kind] = len(report.errors)
    found = ", ".join(f"{kind} {count:,}" for kind, count in wrong.items())
    kinds = f"{len(parts)} kind{'s' * (len(parts) > 1)} of data"
    print(f"\n{kinds}, " + (f"errors: {found}" if wrong else "no errors"), file=out)
    return 2 if wrong else 0


def place_of(experiment, kind: str) -> str | None:
    """The path or Hub id of a kind of data, "world" for the embedded world's; None where the config names none."""
    source = getattr(experiment.data, kind, None)
    return getattr(source, "path", source)


def parts_of(experiment) -> dict[str, Part]:
    """What of each kind of data the config takes; a kind that is null is not in it."""
    parts = {}
    for kind in FORMS:
        source, place = getattr(experiment.data, kind, None), place_of(experiment, kind)
        if place is None:
            continue
        fields = () if isinstance(source, str) else ("skip", "limit", "split", "subset", "revision")  # str has a split
        given = {name: getattr(source, name) for name in fields if hasattr(source, name)}
        here = place == "world" or Path(place).expanduser().exists()
        parts[kind] = Part(**given, hub=None if here else place)
    return parts


def files_of(experiment, home: Path) -> dict[str, Path]:
    """The files of the `data:` section that are on this machine; those of the world lie in its artifact."""
    files = {}
    for kind in FORMS:
        if (place := place_of(experiment, kind)) is not None:
            files[kind] = home / "world" / f"{kind}.jsonl" if place == "world" else Path(place).expanduser()
    return {kind: file for kind, file in files.items() if file.is_file()}


def limits_of(experiment, kind: str | None) -> dict:
    """max_length and on_too_long for this kind; a prompt has to leave room for response_length."""
    sections = [getattr(experiment, name, None) for name in READERS.get(kind, ())]
    sections = [section for section in sections if getattr(section, "max_length", None) is not None]
    section = min(sections, key=lambda section: section.max_length, default=None)  # the strictest decides
    length = getattr(section, "max_length", None)
    if length is not None and RECORD[kind] is RECORD["prompts"]:
        length -= getattr(section, "response_length", 0)
    found = {"max_length": length, "on_too_long": getattr(section, "on_too_long", None)}
    if kind == "demonstrations" and getattr(experiment.data, "prompts", None) is not None:  # else there is no PPO
        found["response_length"] = getattr(getattr(experiment, "ppo", None), "response_length", None)
    return found


def tokenizer_of(experiment, home: Path) -> tuple[object | None, str]:
    """The tokenizer of the published base model, or else of model.name_or_path; and what to say of it."""
    named = getattr(experiment.model, "name_or_path", None)
    template, variables = (getattr(experiment.model, f"chat_template{end}", None) for end in ("", "_kwargs"))
    folders = [home / "base" / "model", *([Path(named).expanduser()] if named else [])]
    if template is not None or variables is not None:  # which base's tokenizer may be older than
        folders = folders[::-1]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return None, "none on this machine yet (`base` publishes it); lengths are in words"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if folder != home / "base" / "model":
            as_base_will(tokenizer, template, variables)
    except Exception as fault:  # the tokenizers library raises nothing finer, and a template what it likes
        return None, f"{folder} cannot be loaded ({first_line(fault)}); lengths are in words"
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        return None, f"{folder} has no chat template or no EOS; lengths are in words"
    return tokenizer, str(folder)


def as_base_will(tokenizer, template: str | None, variables: dict | None) -> None:
    """Give a tokenizer the chat template and the EOS that `base` will publish it with.

    Args:
        tokenizer: The tokenizer of the model that `base` starts from.
        template: The file that model.chat_template names.
        variables: model.chat_template_kwargs.
    """
    if template is not None:
        tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
    if tokenizer.chat_template is not None and variables:
        tokenizer.chat_template = with_variables(tokenizer.get_chat_template(), variables)
    if tokenizer.chat_template is not None:
        tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
