"""Test `rlhf data export`: tasks say nothing about where responses come from, and read back."""

import json
from xml.etree import ElementTree

import pytest

from data.check.config import Input
from data.records import judged_pairs, prompt_key
from data.source import Source
from data.sources import load
from data.tools import export
from data.tools.export import Request, check_tiers
from pipeline import cli
from pipeline.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is <b>red</b> & blue?\u2028Say."},
]
ROWS = [
    {
        "id": "gpt-4 against llama",
        "prompt": "a",
        "responses": ["x", "y", "z"],
        "ranks": [1, 2, 3],
        "labeler": "labeler-7",
    },
    {"prompt": "a", "responses": ["z", "y", "x"], "ranks": [1, 2, 3], "labeler": "labeler-8"},
    {"prompt": "b", "responses": ["p", "q", "", "q"], "ranks": [None, None, None, None], "meta": {"model": "llama"}},
    {"prompt": "c", "responses": ["same", "same"], "ranks": [1, 2]},
    {"prompt": CHAT, "responses": ["A <i>fox</i>.\n$items", "Sky"], "scores": [1, 2]},
]


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def exported(tmp_path, tool, rows=ROWS, seed=0, **reading):
    path = written(tmp_path / "rows.jsonl", *rows)
    folder = tmp_path / f"{tool}-{seed}"
    assert export.run([Input(Source(path, **reading))], None, Request(tool, folder, seed), None) == 0
    return folder


def order_of(texts):
    """Return the order in which the simulated person ranks texts: by their last letter."""
    return sorted(texts, key=lambda text: text[-1])


def test_label_studio_round_trip(tmp_path, capsys):
    """Sort the responses of each task into buckets as a person would, and read the export."""
    tiers = ('very "good"', "so & so", "<bad>")
    folder = exported(tmp_path, "labelstudio", tiers=tiers)
    assert "read back: rlhf data check EXPORT.json" in capsys.readouterr().out
    view = ElementTree.fromstring((folder / "config.xml").read_text())
    assert tuple(bucket.get("name") for bucket in view.iter("Bucket")) == tiers
    ranker, shown = view.find("Ranker"), view.find("List")
    assert ranker.get("toName") == shown.get("name") and shown.get("value") == "$items"
    assert view.find("Paragraphs").get("value") == "$prompt"  # one prompt is a conversation

    tasks = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    assert len(tasks) == 3  # one set of responses twice, one without two different ones
    answered, placed = [], {}
    for number, task in enumerate(tasks, 1):
        items = task["data"]["items"]
        texts = order_of([item["body"] for item in items])
        place = {text: i for i, text in enumerate(texts)}
        placed[prompt_key(task["data"]["prompt"])] = place
        buckets = {tier: [one["id"] for one in items if place[one["body"]] == i] for i, tier in enumerate(tiers)}
        result = {
            "value": {"ranker": {**buckets, "_": []}},
            "from_name": "rank",
            "to_name": "responses",
            "type": "ranker",
        }
        annotation = {"id": number, "completed_by": 5, "was_cancelled": False, "result": [result]}
        answered.append({"id": number, "data": task["data"], "annotations": [annotation], "predictions": []})
    path = tmp_path / "export.json"
    path.write_text(json.dumps(answered))
    rankings = load("rankings", Source(path, tiers=tiers))
    assert len(rankings) == 3
    for ranking in rankings:
        place = placed[prompt_key(ranking.prompt)]
        assert sorted(place) == sorted(ranking.responses)
        for i, j, verdict in judged_pairs(ranking):
            assert verdict == "usable" and place[ranking.responses[i]] < place[ranking.responses[j]]
    assert prompt_key(CHAT) in placed


def test_argilla_round_trip(tmp_path):
    folder = exported(tmp_path, "argilla")
    assert sorted(path.name for path in folder.iterdir()) == [
        "records_k2.json",
        "records_k2_chat.json",
        "records_k3.json",
        "settings_k2.json",
        "settings_k2_chat.json",
        "settings_k3.json",
    ]
    for records in folder.glob("records_*.json"):
        settings = json.loads(folder.joinpath(records.name.replace("records", "settings")).read_text())
        fields = [field["name"] for field in settings["fields"]]
        [question] = settings["questions"]
        assert [option["value"] for option in question["settings"]["options"]] == fields[1:]
        rows = json.loads(records.read_text(encoding="utf-8"))
        for row in rows:
            assert list(row["fields"]) == fields and (settings["fields"][0]["settings"]["type"] == "chat") == (
                not isinstance(row["fields"]["prompt"], str)
            )
            names = sorted(fields[1:], key=lambda name: row["fields"][name][-1])
            value = [{"value": name, "rank": rank} for rank, name in enumerate(names, 1)]
            row["responses"] = {"ranking": [{"value": value, "user_id": "00000000-0000-0000-0000-000000000001"}]}
        path = tmp_path / "answered.json"
        path.write_text(json.dumps(rows))
        for ranking in load("rankings", Source(path)):
            best = [text for text, rank in zip(ranking.responses, ranking.ranks, strict=True) if rank == 1]
            assert best == order_of(ranking.responses)[:1]


@pytest.mark.parametrize("tool", ["labelstudio", "argilla"])
def test_tasks_hide_where_responses_come_from(tmp_path, tool, capsys):
    folder = exported(tmp_path, tool)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()))
    for secret in ("gpt-4", "llama", "labeler-7", "ranks", "scores"):
        assert secret not in text.lower()
    out = capsys.readouterr().out
    assert "left out  1: the same responses to the same prompt came before" in out
    assert "left out  1: rankings without two different responses" in out
    (tmp_path / "a").mkdir()
    again = exported(tmp_path / "a", tool)
    assert "".join(path.read_text(encoding="utf-8") for path in sorted(again.iterdir())) == text


def test_the_order_says_nothing(tmp_path):
    """Check that the best response is first as often as chance has it, and that the seed counts."""
    rows = [{"prompt": f"p {n}", "responses": ["b", "a", "c", "d"], "ranks": [1, 2, 3, 4]} for n in range(400)]
    firsts = []
    for seed in (0, 1):
        tasks = json.loads((exported(tmp_path, "labelstudio", rows, seed) / "tasks.json").read_text())
        firsts.append([task["data"]["items"][0]["body"] for task in tasks])
        assert 70 < firsts[-1].count("b") < 130
        assert [item["id"] for item in tasks[0]["data"]["items"]] == ["1", "2", "3", "4"]
    assert firsts[0] != firsts[1]


@pytest.mark.parametrize("tiers", [("a",), ("a", "a"), ("a", "_"), ("a", "$b"), ("a", "")])
def test_tiers_that_label_studio_cannot_have(tiers):
    with pytest.raises(UserError, match="tiers: "):
        check_tiers(tiers)


def test_the_command(tmp_path, capsys):
    path = str(written(tmp_path / "rows.jsonl", ROWS[0]))
    command = ["data", "export", path, "--to", "labelstudio", "-o", str(tmp_path / "out")]
    assert cli.main([*command, "tiers=great,fine,poor"]) == 0
    assert '<Bucket name="great" title="great"/>\n    <Bucket name="fine"' in (tmp_path / "out/config.xml").read_text()
    assert '<Text name="prompt" value="$prompt"' in (tmp_path / "out/config.xml").read_text()
    assert cli.main(command) == 2 and "exists" in capsys.readouterr().err
    assert cli.main([*command, "--force", "--tiers", "x,y"]) == 0
    bad = str(written(tmp_path / "bad.jsonl", ROWS[0], {"prompt": "p", "responses": ["x"], "ranks": [1]}))
    command = ["data", "export", bad, "--to", "argilla", "-o", str(tmp_path / "none")]
    assert cli.main(command) == 2 and "bad.jsonl:2: " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    same = str(written(tmp_path / "same.jsonl", ROWS[3]))
    assert cli.main(["data", "export", same, *command[3:]]) == 2 and "no task is left" in capsys.readouterr().err
    asked = str(written(tmp_path / "prompts.jsonl", {"prompt": "p"}))
    assert cli.main(["data", "export", asked, *command[3:]]) == 2 and "people compare" in capsys.readouterr().err
