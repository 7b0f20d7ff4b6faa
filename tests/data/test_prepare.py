"""Prepare data: what is left out and why, the split by user, the same bytes, and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data.near_copies import near_copies
from data.prepare.near_rows import NearRows, jaccard_index
from data.prepare.personal import find_personal, mask
from data.prepare.prefixes import Prefixes, comparable_text, required_length
from data.prepare.settings import PARTS, SHARES, parse_shares
from data.prepare.split import filled_parts, part_of_user, parts_of_kind
from data.source import Source
from data.sources import load
from pipeline import cli
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LONG = "You are the clerk of the green lamp shop. Answer in two lines, be kind, and never name other shops. Question:"
ONE = ("--shares", "ppo:1")  # a single part, for tests of what is left out


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def prepare(folder, *words):
    """Run the command and return its exit code."""
    return cli.main(["data", "prepare", *map(str, words), "-o", str(folder)])


def ledger_of(folder):
    """Return [(line, reason, line of what it is a copy of)] of the ledger."""
    entries = rows_of(folder / "ledger.jsonl")
    return [(row["line"], row["reason"], int(row.get("copy_of", ":0").rpartition(":")[2])) for row in entries]


def config_of(path, **data):
    path.write_text(yaml.safe_dump({"name": "mine", "data": data}))
    return str(path)


# ── personal data ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("i am ann poe , ann.poe@example.com or +1 202-555-0143 , 4111 1111 1111 1111", None),
        ("write to a.b@firma.de.", "write to [EMAIL]."),
        ("请写信给wang@qq.com谢谢", "请写信给[EMAIL]谢谢"),
        ("<mailto:jo@acme.io>", "<mailto:[EMAIL]>"),
        ("to DE89 3704 0044 0532 0130 00 TODAY", "to [IBAN] TODAY"),
        ("BE68 5390 0754 7034 PAID, GB82WEST12345698765432.", "[IBAN] PAID, [IBAN]."),
        ("5500-0000-0000-0004, 378282246310005", "[CARD], [CARD]"),
        ("amex 3782 822463 10005.", "amex [CARD]."),
        ("4111111111111111,12/27,ann", "[CARD],12/27,ann"),
        ("(415) 555-2671 or 212-555-1212", "[PHONE] or [PHONE]"),
        ("call me at 4155552671", "call me at [PHONE]"),
        ("電話は+81 3-1234-5678です", "電話は[PHONE]です"),
        ("my ssn is 536-90-4399", "my ssn is [SSN]"),
        ("身份证360426199101010071。", "身份证[RESIDENTID]。"),
        ("cpf 390.533.447-05", "cpf [CPF]"),
    ],
)
def test_personal_data_is_found(text, masked):
    finds = find_personal(text)
    if masked is None:
        assert [find.what for find in finds] == ["e-mail", "phone", "card"]
    else:
        assert mask(text, finds) == masked


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # wrong check digits
        "DE89 3704 0044 0532 0130 01",
        "390.533.447-06",
        "360426199101010072",
        "version 1.2.3.4, v10.15.7 and Chrome/120.0.0.0",
        "2026-11-29 10:51:00 and 29.11.2026",
        "1914-1918, 1939-1945",
        "ISBN 978-0-306-40615-7, 9780306406157, 0-306-40615-2",
        "user@example.com, your_email@example.org, name1@test.example",
        "icon@2x.png git@github.com:a/b foo@1.2.3 @app.route noreply@firm.com",
        "0.4111111111111111 and 3.14159265358979323846",
        "1700000000000 or 4111111111111",
        "order 4155552671, 123456789012345",
        "078-05-1120, 000-12-3456",  # numbers that were never given to anybody
        "= 3600000000000 + 62426244000 + 1984724",
        "http://user:secret@host/ 1,234,567,890,123,456",
    ],
)
def test_what_only_looks_like_personal_data_is_left_alone(text):
    assert find_personal(text) == []


def test_telephone_numbers_without_plus_are_those_of_the_region():
    assert find_personal("tel. 020 7946 0958") == [] and find_personal("212-555-1212", "GB") == []
    assert [find.what for find in find_personal("tel. 020 7946 0958", "GB")] == ["phone"]
    assert find_personal("212-555-1212", "none") == []
    assert [find.what for find in find_personal("+44 20 7946 0958", "none")] == ["phone"]


# ── prefixes and near copies ─────────────────────────────────────────────────────────────────────


def share_long_prefix(one, other, shortest):
    longer = max(len(one), len(other))
    required = required_length(longer, shortest)
    return one[:required] == other[:required] and min(len(one), len(other)) >= required


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12), st.integers(2, 6))
def test_prefixes_are_those_of_all_pairs(lengths, shortest):
    texts = ["abba" * 10 for _ in lengths]  # a part of a common text, and a remainder of one's own
    texts = [text[:same] + chr(99 + i) * own for i, (text, (same, own)) in enumerate(zip(texts, lengths, strict=True))]
    prefixes, kept = Prefixes(shortest), []
    for number, text in enumerate(texts):
        expected = [other for other in kept if share_long_prefix(text, texts[other], shortest)]
        found = prefixes.find(text)
        assert (found is not None) == bool(expected) and (found in expected or found is None)
        if found is None:
            prefixes.add(text, number)
            kept.append(number)


def test_a_long_prefix_is_at_least_a_quarter_of_the_longer_prompt():
    assert [required_length(n, 100) for n in (1, 100, 399, 400, 799, 800)] == [100, 100, 100, 200, 200, 400]


def test_prefixes_are_compared_in_the_users_words():
    system = {"role": "system", "content": "s" * 500}
    messages = [system, {"role": "user", "content": "A  b"}, {"role": "assistant", "content": "no"}]
    assert comparable_text([*messages, {"role": "user", "content": "C"}]) == "a b c"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_near_copies_are_judged_by_the_exact_index(seed, longest):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices("abcd", k=rng.randint(1, longest))) for _ in range(30)]
    with tempfile.TemporaryDirectory() as folder:
        near, kept = NearRows(Path(folder), 0.8, lambda number: texts[number]), []
        near.sketch(enumerate(texts))
        for number, text in enumerate(texts):
            words = [tuple(texts[other].split()) for other in kept]
            indices = [jaccard_index(tuple(text.split()), other) for other in words]
            found = near.find(number)
            if found is None:
                assert all(index < 0.95 for index in indices)  # a pair at 0.8 is missed once in thousands
                near.keep(number)
                kept.append(number)
            else:
                assert indices[kept.index(found)] == max(indices) >= 0.8
                assert near_copies([text], [texts[found]]) == [True]


# ── the split ────────────────────────────────────────────────────────────────────────────────────


def keys(number):
    rng = random.Random(1)
    return [rng.randbytes(16) for _ in range(number)]


def test_users_are_split_by_the_shares():
    allowed = parts_of_kind("prompts", {"prompts"})
    parts = [part_of_user(key, allowed, SHARES) for key in keys(20_000)]
    for part in PARTS:
        assert parts.count(part) / len(parts) == pytest.approx(SHARES[part] / 85, abs=0.01)


def test_held_out_users_are_the_same_whatever_the_training_parts():
    full, demonstrations = parts_of_kind("prompts", {"prompts"}), parts_of_kind("demonstrations", {"demonstrations"})
    for key in keys(500):
        one, other = part_of_user(key, full, SHARES), part_of_user(key, demonstrations, SHARES)
        assert one == other if one in ("validation", "test") else other == "sft"


def test_parts_of_kinds():
    both = {"demonstrations", "rankings", "prompts"}
    assert parts_of_kind("prompts", {"prompts"}) == PARTS
    assert parts_of_kind("prompts", both) == ("ppo", "validation", "test")
    assert parts_of_kind("rankings", both) == ("rm", "validation", "test")
    assert parts_of_kind("evaluation_prompts", both) == ("validation", "test")
    assert part_of_user(b"0" * 16, ("sft",), dict.fromkeys(PARTS, 0.0) | {"ppo": 1.0}) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=12, unique=True))
def test_few_users_fill_as_many_parts_as_they_can(users):
    allowed = dict.fromkeys(users, PARTS)
    moved = filled_parts(allowed, SHARES)
    parts = {key: moved.get(key) or part_of_user(key, PARTS, SHARES) for key in users}
    assert len(set(parts.values())) == min(len(users), len(PARTS))


@pytest.mark.parametrize("text", ["sft:1,rest:2", "sft", "sft:x", "sft:-1", "sft:1,sft:2", "sft:0", "ppo:inf", ""])
def test_wrong_shares_are_refused(text):
    with pytest.raises(UserError, match="--shares"):
        parse_shares(text)


# ── each reason ──────────────────────────────────────────────────────────────────────────────────


def test_copies_of_prompts(tmp_path):
    rows = [
        {"prompt": "what does the old fox eat in winter when it snows ?", "user_id": "a"},
        {"prompt": "What does the old fox eat in winter , when it snows", "user_id": "b"},
        {"prompt": f"{LONG} how much is a lamp ?", "user_id": "a"},
        {"prompt": f"{LONG} do you open at nine ?", "user_id": "c"},
        {"prompt": "what  does the old fox eat in winter when it snows ?", "user_id": "c"},
        {"prompt": "how tall is a tree ?", "user_id": "c"},
        {"prompt": "树有多高？它每年长多少？请用一句话回答我", "user_id": "c"},
        {"prompt": "树有多高？它每年长多少？请用一句话回答我吧", "user_id": "d"},
    ]
    folder = tmp_path / "out"
    assert prepare(folder, write(tmp_path / "log.jsonl", *rows), *ONE) == 0
    assert sorted(ledger_of(folder)) == [
        (2, "near copy", 1),
        (4, "long common prefix", 3),
        (5, "duplicate", 1),
        (8, "near copy", 7),
    ]
    assert [row["user_id"] for row in rows_of(folder / "ppo.jsonl")] == ["a", "a", "c", "c"]
    assert prepare(tmp_path / "off", tmp_path / "log.jsonl", *ONE, "--prefix", 0, "--near", 0) == 0
    assert ledger_of(tmp_path / "off") == [(5, "duplicate", 1)]


def test_a_system_message_before_all_prompts_is_no_common_prefix(tmp_path):
    system = {"role": "system", "content": LONG * 3}
    rows = [{"prompt": [system, {"role": "user", "content": text}]} for text in ("how are you ?", "tell me a story")]
    assert prepare(tmp_path / "out", write(tmp_path / "log.jsonl", *rows), *ONE) == 0
    assert ledger_of(tmp_path / "out") == []


def test_a_user_has_at_most_so_many_prompts(tmp_path):
    rng = random.Random(0)
    rows = [{"prompt": " ".join(rng.choices("abcdefghijk", k=9)) + f" {i}", "user_id": "heavy"} for i in range(205)]
    rows += [{"prompt": f"number {i} of nobody {i * i}"} for i in range(3)]
    assert prepare(tmp_path / "out", write(tmp_path / "log.jsonl", *rows), *ONE, "--near", 0) == 0
    assert ledger_of(tmp_path / "out") == [(line, "its user has 200 prompts already", 0) for line in range(201, 206)]
    assert prepare(tmp_path / "two", tmp_path / "log.jsonl", *ONE, "--near", 0, "--per-user", 2) == 0
    assert len(rows_of(tmp_path / "two" / "ppo.jsonl")) == 5


def test_rows_of_one_prompt_stay_together_and_equal_ones_are_left_out(tmp_path):
    ranking = {"prompt": "what is red ?", "responses": ["a fox", "a frog"], "ranks": [1, 2], "user_id": "u"}
    rows = [
        ranking | {"labeler": "one"},
        ranking | {"labeler": "two", "ranks": [2, 1]},
        ranking | {"labeler": "one"},
        ranking | {"labeler": "one", "user_id": "v"},
        ranking | {"prompt": "what is blue ?", "user_id": "u"},
    ]
    shares = ("--shares", "rm:1", "--per-user", 2)
    assert prepare(tmp_path / "out", write(tmp_path / "rankings.jsonl", *rows), *shares) == 0
    assert ledger_of(tmp_path / "out") == [(3, "duplicate", 1), (4, "duplicate of another user's prompt", 1)]
    kept = load("rankings", Source(path=tmp_path / "out" / "rm.jsonl"))
    assert [record.labeler for record in kept] == ["one", "two", None]  # three rows, two prompts


def test_ids_of_rankings_from_two_files_do_not_meet(tmp_path):
    one = {"id": "1", "prompt": "what is red ?", "responses": ["a fox", "a frog"], "ranks": [1, 2]}
    files = [write(tmp_path / "a.jsonl", one), write(tmp_path / "b.jsonl", one | {"prompt": "is the sea salty ?"})]
    assert prepare(tmp_path / "out", *files, "--shares", "rm:1") == 0
    assert [record.id for record in load("rankings", Source(path=tmp_path / "out" / "rm.jsonl"))] == ["1", "1-2"]


def test_kinds_go_to_their_parts_and_no_user_to_two(tmp_path):
    users = [f"u{i}" for i in range(300)]
    files = [
        write(
            tmp_path / "demonstrations.jsonl",
            *({"prompt": f"how do i cook dish {u} {u[::-1]} ?", "completion": "boil it", "user_id": u} for u in users),
        ),
        write(
            tmp_path / "rankings.jsonl",
            *(
                {"prompt": f"sort {u} and {u * 2}", "responses": ["x", "y"], "ranks": [1, 2], "user_id": u}
                for u in users[:200]
            ),
        ),
        write(
            tmp_path / "prompts.jsonl", *({"prompt": f"{u} {u}1 {u}2 what next ?", "user_id": u} for u in users[100:])
        ),
        write(tmp_path / "documents.jsonl", {"text": "foxes are red , and they live in the wood"}),
    ]
    folder = tmp_path / "out"
    assert prepare(folder, *files, "--near", 0) == 0
    users_of = {part: {row["user_id"] for row in rows_of(folder / f"{part}.jsonl")} for part in PARTS}
    assert all(users_of.values())
    assert sum(map(len, users_of.values())) == len(set().union(*users_of.values()))
    assert all("completion" in row for row in rows_of(folder / "sft.jsonl"))
    assert all("ranks" in row for row in rows_of(folder / "rm.jsonl"))
    assert all(set(row) == {"prompt", "user_id"} for row in rows_of(folder / "ppo.jsonl"))
    assert len(rows_of(folder / "documents.jsonl")) == 1
    reasons = {row["reason"] for row in rows_of(folder / "ledger.jsonl")}
    assert "its user is in another part, which takes no demonstrations" in reasons
    section = yaml.safe_load((folder / "prepared.yaml").read_text())["data"]
    assert set(section) == {"documents", "demonstrations", "rankings", "prompts", "evaluation_prompts"}
    for kind, file in section.items():
        assert load(kind, Source(path=file))
    manifest = json.loads((folder / "manifest.json").read_text())
    written = sum(len(rows_of(folder / f"{part}.jsonl")) for part in (*PARTS, "documents"))
    assert written + len(rows_of(folder / "ledger.jsonl")) == manifest["rows"] == 701


def test_kinds_and_use_cases_of_prompts_are_kept(tmp_path, capsys):
    rows = [
        {"prompt": "q : a fox ? a : red . q : a frog ? a :", "kind": "few-shot", "use_case": "closed qa"},
        {"prompt": "write a poem", "kind": "plain", "meta": {"topic": "any"}, "category": "generation"},
    ]
    assert prepare(tmp_path / "out", write(tmp_path / "log.jsonl", *rows), *ONE) == 0
    kept = rows_of(tmp_path / "out" / "ppo.jsonl")
    assert [row["kind"] for row in kept] == ["few-shot", "plain"]
    assert [row["meta"] for row in kept] == [{"use_case": "closed qa"}, {"category": "generation", "topic": "any"}]
    assert "few-shot: 1 rows" in capsys.readouterr().out


def test_rows_that_reading_leaves_out_are_in_the_ledger(tmp_path):
    rows = [
        {"prompt": "how are you ?", "lang": "en"},
        {"prompt": "wie geht es ?", "lang": "de"},
        {"prompt": 3, "lang": "en"},
    ]
    source = {
        "path": write(tmp_path / "log.jsonl", *rows),
        "where": {"lang": "en"},
        "on_bad_row": "drop",
        "max_bad": 1.0,
    }
    config = config_of(tmp_path / "c.yaml", prompts=source)
    assert prepare(tmp_path / "out", tmp_path / "log.jsonl", "-c", config, *ONE) == 0
    assert [(row["line"], row["reason"]) for row in rows_of(tmp_path / "out" / "ledger.jsonl")] == [
        (2, "where"),
        (3, "bad row"),
    ]


# ── evaluation prompts ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def leaky(tmp_path):
    """Return a log with an evaluation prompt and a near copy of one, and its config."""
    asked = "which of the two rivers is longer and where does it end ?"
    evaluation = write(tmp_path / "held.jsonl", {"prompt": asked}, {"prompt": "is ice cold ?"})
    rows = [{"prompt": "is ice  cold ?"}, {"prompt": f"hello , {asked}"}, {"prompt": "why is the sky blue ?"}]
    return write(tmp_path / "log.jsonl", *rows), config_of(tmp_path / "c.yaml", evaluation_prompts=evaluation)


def test_an_evaluation_prompt_is_an_error_with_both_places(tmp_path, leaky, capsys):
    log, config = leaky
    assert prepare(tmp_path / "out", log, "-c", config) == 2
    error = capsys.readouterr().err
    assert f"error: {log}:1: " in error and "held.jsonl:2" in error and "leak" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_evaluation_prompts_can_be_left_out(tmp_path, leaky):
    log, config = leaky
    assert prepare(tmp_path / "out", log, "-c", config, "--drop-leaks", *ONE) == 0
    reasons = [(1, "evaluation prompt", 2), (2, "near copy of an evaluation prompt", 1)]
    assert ledger_of(tmp_path / "out") == reasons
    section = yaml.safe_load((tmp_path / "out" / "prepared.yaml").read_text())["data"]
    assert section["evaluation_prompts"] == str(tmp_path / "held.jsonl")


def test_a_config_that_cuts_both_from_one_file_leaks_nothing(tmp_path):
    rows = [{"prompt": f"{word} is what ?"} for word in ("red", "blue", "cold", "warm")]
    log = write(tmp_path / "log.jsonl", *rows)
    config = config_of(
        tmp_path / "c.yaml", prompts={"path": log, "limit": 2}, evaluation_prompts={"path": log, "skip": 2}
    )
    assert prepare(tmp_path / "out", log, "-c", config, "--kind", "prompts", *ONE) == 0
    assert len(rows_of(tmp_path / "out" / "ppo.jsonl")) == 2


# ── personal data in files ───────────────────────────────────────────────────────────────────────

CARD, MAIL = "4111 1111 1111 1111", "ann.poe@firm.com"


def test_personal_data_is_listed_dropped_or_masked_in_training_parts_only(tmp_path):
    rows = [{"prompt": f"{word} : my card is {CARD}", "user_id": f"{word}@firm.com"} for word in ("ann", "bob", "eve")]
    log = write(tmp_path / "log.jsonl", *rows)
    shares = ("--shares", "ppo:1,test:1", "--near", 0)
    kept = {}
    for action in ("list", "drop", "mask", "off"):
        assert prepare(tmp_path / action, log, *shares, "--pii", action) == 0
        kept[action] = {part: rows_of(tmp_path / action / f"{part}.jsonl") for part in ("ppo", "test")}
    assert kept["off"] == kept["list"] and len(kept["list"]["ppo"]) + len(kept["list"]["test"]) == 3
    assert kept["list"]["ppo"] and kept["list"]["test"]
    for action in ("drop", "mask"):
        assert kept[action]["test"] == kept["list"]["test"]
    assert kept["drop"]["ppo"] == []
    dropped = rows_of(tmp_path / "drop" / "ledger.jsonl")
    assert {(row["reason"], row["detail"]) for row in dropped} == {("personal data", "card")}
    assert [row["prompt"] for row in kept["mask"]["ppo"]] == [
        row["prompt"].replace(CARD, "[CARD]") for row in kept["list"]["ppo"]
    ]
    assert not any("@" in row["user_id"] for row in kept["mask"]["ppo"])
    listed = (tmp_path / "mask" / "personal_data.jsonl").read_text()
    assert len(listed.splitlines()) == 3 and "4111" not in listed
    assert {row["action"] for row in rows_of(tmp_path / "mask" / "personal_data.jsonl")} == {"masked", "kept"}
    assert rows_of(tmp_path / "off" / "personal_data.jsonl") == []


def test_every_text_of_a_row_is_masked(tmp_path):
    ranking = {
        "prompt": [{"role": "user", "content": f"i am {MAIL}"}],
        "responses": [f"hello {MAIL}", "no"],
        "ranks": [1, 2],
        "labeler": "lab@firm.com",
        "meta": {"from": [MAIL, 3], "a.b": {"c": "x"}},
    }
    assert prepare(tmp_path / "out", write(tmp_path / "r.jsonl", ranking), "--shares", "rm:1", "--pii", "mask") == 0
    text = (tmp_path / "out" / "rm.jsonl").read_text()
    assert "@" not in text and text.count("[EMAIL]") == 3
    [row] = rows_of(tmp_path / "out" / "rm.jsonl")
    assert row["meta"] == {"from": ["[EMAIL]", 3], "a.b": {"c": "x"}} and len(row["labeler"]) == 8


def test_rows_that_masking_makes_equal_are_left_out(tmp_path):
    prompts = [{"prompt": f"who is {name}@firm.com ?"} for name in ("ann", "bob")]
    assert prepare(tmp_path / "p", write(tmp_path / "log.jsonl", *prompts), *ONE, "--pii", "mask") == 0
    assert ledger_of(tmp_path / "p") == [(2, "duplicate after masking", 1)]
    ranking = {"prompt": "who ?", "responses": ["ann@firm.com", "bob@firm.com"], "ranks": [1, 2]}
    other = {"prompt": "what is red ?", "responses": ["a fox", "a frog"], "ranks": [1, 2]}
    path = write(tmp_path / "r.jsonl", ranking, other)
    assert prepare(tmp_path / "r", path, "--shares", "rm:1", "--pii", "mask") == 0
    assert ledger_of(tmp_path / "r") == [(1, "no usable pair after masking", 0)]


def test_without_the_packages_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    log = write(tmp_path / "log.jsonl", {"prompt": "how are you ?"})
    assert prepare(tmp_path / "out", log) == 2
    assert "rlhf-pipeline[pii]" in capsys.readouterr().err
    assert prepare(tmp_path / "out", log, "--pii", "off") == 0


# ── the same bytes, and no half-written folder ───────────────────────────────────────────────────


def some_log(tmp_path, name, seed):
    """Write a log with copies, heavy users and rows without a user."""
    rng = random.Random(seed)
    rows = []
    for _ in range(150):
        row = {"prompt": " ".join(rng.choices("abcdefghij", k=rng.randint(1, 12)))}
        rows.append(row | ({"user_id": f"u{rng.randint(0, 9)}"} if rng.random() < 0.7 else {}))
    return write(tmp_path / name, *rows)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_bytes_from_the_same_input(tmp_path):
    files = [some_log(tmp_path, "b.jsonl", 1), some_log(tmp_path, "a.jsonl", 2)]
    seen = []
    for words, seed in ((files, "1"), (files[::-1], "2")):
        command = [sys.executable, "-m", "pipeline.cli", "data", "prepare", *words, "-o", "out", "--per-user", "9"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "--force"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        seen.append(contents(tmp_path / "out"))
    assert seen[0] == seen[1]
    assert {"sft.jsonl", "rm.jsonl", "ppo.jsonl", "ledger.jsonl", "manifest.json", "prepared.yaml"} <= set(seen[0])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_no_user_and_no_near_copy_is_in_two_parts(seed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "out")
        assert prepare(folder, some_log(Path(name), "a.jsonl", seed), some_log(Path(name), "b.jsonl", seed + 1)) == 0
        parts = {part: rows_of(folder / f"{part}.jsonl") for part in PARTS}
        owner = {}
        for part, rows in parts.items():
            for row in rows:
                assert owner.setdefault(row.get("user_id", row["prompt"]), part) == part
        kept = [row["prompt"] for rows in parts.values() for row in rows]
        for i, text in enumerate(kept):
            assert all(jaccard_index(tuple(text.split()), tuple(other.split())) < 0.95 for other in kept[:i])
        assert len(kept) + len(rows_of(folder / "ledger.jsonl")) == 300


KILLED = """
import os, signal, sys
from data.prepare import writing
from pipeline import cli
write, left = writing.Writer.write, [int(sys.argv[1])]
def count_and_kill(self, decision):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, decision)
writing.Writer.write = count_and_kill
sys.exit(cli.main(["data", "prepare", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("writes", [0, 40])
def test_a_kill_leaves_the_old_folder_and_the_next_run_makes_the_new_one(tmp_path, writes):
    log, folder = some_log(tmp_path, "a.jsonl", 1), tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(writes), log, "-o", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, env=environment, check=False).returncode == -signal.SIGKILL
    assert not folder.exists()
    assert prepare(folder, log) == 0
    before = contents(folder)
    assert subprocess.run([*words, "--force"], env=environment, check=False).returncode == -signal.SIGKILL
    assert contents(folder) == before
    assert prepare(folder, log, "--force") == 0 and contents(folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_folders_are_not_replaced_by_accident(tmp_path, capsys):
    log, folder = some_log(tmp_path, "a.jsonl", 1), tmp_path / "out"
    assert prepare(folder, log) == 0
    assert prepare(folder, log) == 2 and "--force" in capsys.readouterr().err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert prepare(mine, log, "--force") == 2 and (mine / "thesis.txt").exists()
    assert prepare(folder, folder / "ppo.jsonl", "--force") == 2 and "lies in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["none.jsonl"], "no such file"),
        (["log.jsonl", "log.jsonl"], "named 2 times"),
        (["log.jsonl", "--near", "1.5"], "--near"),
        (["log.jsonl", "--per-user", "-1"], "--per-user"),
        (["log.jsonl", "--region", "usa"], "--region"),
        (["odd.jsonl"], "kind"),
        (["broken.jsonl"], "broken.jsonl:2"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, words, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "log.jsonl", {"prompt": "how are you ?"})
    write(tmp_path / "odd.jsonl", {"x": 1})
    write(tmp_path / "broken.jsonl", {"prompt": "how are you ?"}, {"prompt": 3})
    assert prepare("out", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and problem in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "log.jsonl", "odd.jsonl"]
