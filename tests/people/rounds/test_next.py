"""`rlhf round next`: what is gathered, sifted and mixed, the config that comes out, refusals."""

import json

import pytest
import yaml

from data.records import prompt_key, write_jsonl
from data.source import Source
from data.sources import load
from pipeline import api, cli
from stages.people.rank import snapshots
from stages.people.rounds import command
from stages.people.rounds.old import stays
from stages.people.rounds.status import status_lines
from tests.people.rounds.talking import Round, read_manifest


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    """Return an experiment whose round is finished; its manifests are not checked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    made = Round(tmp_path)
    made.capture = capsys

    def finished(experiment, store):
        store.manifest = lambda stage: read_manifest(store.folder(stage))
        return "ppo"

    made.really_finished = command.finished_policy
    monkeypatch.setattr(command, "finished_policy", finished)
    return made


def config(talk, name="talk-r2"):
    return yaml.safe_load((talk.folder / f"{name}.yaml").read_text())


def test_a_round_without_anything_from_people_ranks_what_nobody_ranked(talk):
    code, out, err = talk.rlhf()
    assert code == 0, err
    assert {row["prompt"] for row in talk.rows("rank_prompts.jsonl")} == {"prompt 6", "prompt 7"}
    assert [row["id"] for row in talk.rows("old_rankings.jsonl")] == ["r0", "r1", "r2", "r3", "r5"]
    made = config(talk)
    assert made["name"] == "talk-r2" and made["round"]["number"] == 2
    assert made["round"]["earlier"] == ["artifacts/talk"] and made["round"]["digests"]["ppo"] == "of ppo"
    assert made["from"] == {"experiment": "talk", "stages": ["base", "sft"]}
    assert made["data"]["rankings"] == ["artifacts/talk-r2/round/old_rankings.jsonl", "ranked"]
    assert made["data"]["demonstrations"] == "demonstrations.jsonl" and made["data"]["prompts"] == "prompts.jsonl"
    assert made["rank"]["policies"] == ["talk/ppo"]
    assert made["rank"]["prompts_from"] == "artifacts/talk-r2/round/rank_prompts.jsonl" and made["rank"]["prompts"] == 5
    assert "start_from" not in made["rm"] and "start_from" not in made["ppo"]
    assert "make rank CONFIG=talk-r2.yaml" in out and "make ppo CONFIG=talk-r2.yaml" in out


def test_the_next_config_keeps_comments_and_loads(talk):
    talk.rlhf()
    text = (talk.folder / "talk-r2.yaml").read_text()
    assert text.startswith("# What people should keep reading.\nname: talk-r2\n")
    assert "max_steps: 5      # short" in text and "demonstrations: demonstrations.jsonl   # by hand" in text
    experiment = api.load_experiment("talk-r2.yaml")
    assert experiment.round.number == 2 and experiment.rank.policies == ["talk/ppo"]


def test_what_people_gave_goes_where_it_belongs(talk):
    talk.rank("prompt 6")
    talk.talk("how do I boil an egg ?", correction="in water", prefers=1)
    talk.talk("who wrote this song about the sea ?", user="u2")
    talk.talk("what is not shared ?", user="u3", consent=False)
    code, _, err = talk.rlhf("rounds.rankings=0")
    assert code == 0, err
    new = talk.rows("new_rankings.jsonl")
    assert [(row["prompt"], row["ranks"]) for row in new] == [("prompt 6", [1, 2]), ("how do I boil an egg ?", [2, 1])]
    (demonstration,) = talk.rows("new_demonstrations.jsonl")
    assert (demonstration["prompt"], demonstration["completion"]) == ("how do I boil an egg ?", "in water")
    asked = {row["prompt"] for row in talk.rows("new_prompts.jsonl")}
    assert asked == {"how do I boil an egg ?", "who wrote this song about the sea ?"}
    made = config(talk)
    folder = "artifacts/talk-r2/round"
    assert made["data"]["demonstrations"] == ["demonstrations.jsonl", f"{folder}/new_demonstrations.jsonl"]
    assert made["data"]["prompts"] == ["prompts.jsonl", f"{folder}/new_prompts.jsonl"]
    assert f"{folder}/new_rankings.jsonl" in made["data"]["rankings"]
    assert made["from"]["stages"] == ["base"]  # new demonstrations, so SFT is made anew
    record = json.loads((talk.folder / folder / "round.json").read_text())
    assert record["after"] == "talk" and [line["new"] for line in record["taken"]] == [1, 2, 2]


def test_thumbs_are_rankings_of_one_response_where_asked(talk):
    talk.rank("prompt 6")
    talk.talk("how do I boil an egg ?", thumb=True)
    talk.talk("who wrote this song about the sea ?", user="u2", thumb=False)
    talk.talk("what is not shared ?", user="u3", consent=False, thumb=True)
    code, _, err = talk.rlhf("rounds.thumbs=true")
    assert code == 0, err
    page, *rows = talk.rows("new_rankings.jsonl")
    assert page["prompt"] == "prompt 6" and "labels" not in page
    assert [(row["prompt"], row["responses"], row["ranks"], row["labels"]) for row in rows] == [
        ("how do I boil an egg ?", ["by sft"], [None], [True]),
        ("who wrote this song about the sea ?", ["by sft"], [None], [False]),
    ]
    loaded = load("rankings", Source(path=talk.folder / "artifacts/talk-r2/round/new_rankings.jsonl"))
    assert [ranking.labels for ranking in loaded] == [None, (True,), (False,)]


def test_thumbs_are_not_taken_by_default(talk):
    talk.rank("prompt 6")
    talk.talk("how do I boil an egg ?", thumb=True)
    code, _, err = talk.rlhf()
    assert code == 0, err
    assert [row["prompt"] for row in talk.rows("new_rankings.jsonl")] == ["prompt 6"]


def test_prompts_are_split_by_user_and_the_first_to_be_ranked_are_people_s(talk):
    for i in range(40):
        talk.talk(f"question number {i} of a person about {chr(97 + i % 26) * 5} ?", user=f"u{i // 4}")
    code, out, err = talk.rlhf("rounds.near=0")
    assert code == 0, err
    ranked = [row for row in talk.rows("rank_prompts.jsonl") if "user_id" in row]
    trained = talk.rows("new_prompts.jsonl")
    assert ranked and trained and len(ranked) + len(trained) == 40
    assert not {row["user_id"] for row in ranked} & {row["user_id"] for row in trained}
    assert "user_id" in talk.rows("rank_prompts.jsonl")[0]
    assert f"to rank: {len(ranked)} prompts of people, then 2 " in out


def test_personal_data_copies_and_evaluation_prompts_stay_out(talk):
    talk.talk("write to jane.roe@hospital.org please")
    talk.talk("write to nobody please, but do it soon", user="u2")
    talk.talk("write to nobody please, but do it soon", user="u3")
    talk.talk("what is asked at the end ?", user="u4")
    talk.talk("prompt 1", user="u5")
    code, out, err = talk.rlhf("rounds.personal=drop", "rounds.rankings=0")
    assert code == 0, err
    assert [row["prompt"] for row in talk.rows("new_prompts.jsonl")] == ["write to nobody please, but do it soon"]
    for reason in ("personal data", "duplicate", "evaluation prompt", "an earlier round has it"):
        assert reason in out, reason
    everything = "".join(path.read_text() for path in (talk.folder / "artifacts/talk-r2/round").glob("*.jsonl"))
    assert "jane.roe" not in everything


def test_at_most_so_many_prompts_of_a_user(talk):
    for i in range(5):
        talk.talk(f"{'abcde'[i] * 9} is a word, is it not ?")
    code, _, err = talk.rlhf("rounds.per_user=2", "rounds.rankings=0", "rounds.near=0")
    assert code == 0, err
    assert len(talk.rows("new_prompts.jsonl")) == 2


def test_what_the_snapshot_of_the_round_had_is_not_new(talk):
    talk.rank("prompt 6")
    database = talk.database()
    path = snapshots.take(talk.base, "talk", database)
    database.close()
    source = {"path": "both", "parts": {"1": {"path": "rankings.jsonl"}, "2": {"path": str(path)}}}
    talk.publish("rankings", data={"rankings": source})
    talk.rank("prompt 7")
    assert talk.rlhf()[0] == 0
    assert [row["prompt"] for row in talk.rows("new_rankings.jsonl")] == ["prompt 7"]


def test_a_third_round_takes_what_came_since_the_second(talk):
    talk.rank("prompt 6")
    assert talk.rlhf()[0] == 0
    for stage in ("rankings", "rm", "ppo"):
        folder = talk.folder / "artifacts/talk-r2" / stage
        folder.mkdir(parents=True)
        config_of = {"from": {"sft": {"experiment": "talk", "folder": "../talk/sft"}}} if stage == "rm" else {}
        (folder / "manifest.json").write_text(json.dumps({"digest": "x", "config": config_of}))
    rows = talk.rows("old_rankings.jsonl") + talk.rows("new_rankings.jsonl")
    write_jsonl(talk.folder / "artifacts/talk-r2/rankings/train.jsonl", rows)
    talk.rank("prompt 7", labeler="bob")  # on the page of round 1, which is still open
    code, _, err = talk.rlhf(config="talk-r2.yaml")
    assert code == 0, err
    assert [row["prompt"] for row in talk.rows("new_rankings.jsonl", "talk-r3")] == ["prompt 7"]
    made = config(talk, "talk-r3")
    assert made["round"]["earlier"] == ["artifacts/talk", "artifacts/talk-r2"] and made["round"]["number"] == 3
    assert made["from"] == {"experiment": "talk", "stages": ["base", "sft"]}
    assert made["rank"]["policies"] == ["talk-r2/ppo"]
    assert made["data"]["rankings"] == [
        "artifacts/talk-r3/round/old_rankings.jsonl",
        "artifacts/talk-r3/round/new_rankings.jsonl",
        "ranked",
    ]


def test_excluded_rankings_leave_the_old_ones(talk):
    talk.rank("prompt 6")
    database = talk.database()
    path = snapshots.take(talk.base, "talk", database)
    talk.publish("rankings", data={"rankings": {"path": str(path)}})
    taken = [json.loads(line) for line in path.read_text().splitlines()]
    talk.file("rankings/train.jsonl", [*taken, {"id": "r0", "prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}])
    with database.transaction() as connection:
        connection.execute("UPDATE verdicts SET accepted = 'excluded'")
    database.close()
    assert talk.rlhf()[0] == 0
    assert "r0" in (ids := [row["id"] for row in talk.rows("old_rankings.jsonl")]) and taken[0]["id"] not in ids


def test_a_stated_share_of_the_old_rows_stays_by_prompt(talk):
    code, _, err = talk.rlhf("rounds.old={rankings: 0.5, prompts: 0.6, demonstrations: 0.9}")
    assert code == 0, err
    kept = [f"r{i}" for i in (0, 1, 2, 3, 5) if stays(prompt_key(f"prompt {i}"), 0.5, 3)]
    assert [row["id"] for row in talk.rows("old_rankings.jsonl")] == kept and 0 < len(kept) < 5
    prompts = [f"prompt {i}" for i in range(8) if stays(prompt_key(f"prompt {i}"), 0.6, 3)]
    assert [row["prompt"] for row in talk.rows("old_prompts.jsonl")] == prompts
    assert config(talk)["data"]["prompts"] == "artifacts/talk-r2/round/old_prompts.jsonl"


def test_where_models_start(talk):
    code, _, err = talk.rlhf("rounds.reward_model_from=last", "rounds.policy_from=last")
    assert code == 0, err
    made = config(talk)
    assert made["rm"]["start_from"] == "artifacts/talk/rm/model"
    assert made["ppo"]["start_from"] == "artifacts/talk/ppo/model" and made["ppo"]["total_episodes"] == 64
    assert "KL is still measured to this round's SFT" in (talk.folder / "talk-r2.yaml").read_text()


def test_a_dry_run_writes_nothing(talk):
    talk.rank("prompt 6")
    code, out, _ = talk.rlhf("--dry-run")
    assert code == 0 and "dry run" in out and "rankings" in out
    assert not (talk.folder / "talk-r2.yaml").exists() and not (talk.folder / "artifacts/talk-r2").exists()


def test_an_edited_config_is_never_written_over(talk):
    talk.rlhf()
    path = talk.folder / "talk-r2.yaml"
    path.write_text(path.read_text() + "# mine\n")
    code, _, err = talk.rlhf()
    assert code == 2 and err.count("\n") == 1 and "round 2 exists already" in err
    assert path.read_text().endswith("# mine\n")


def test_a_run_that_stopped_before_the_config_goes_on(talk):
    talk.rlhf()
    path = talk.folder / "talk-r2.yaml"
    text = path.read_text()
    path.unlink()
    code, out, _ = talk.rlhf()
    assert code == 0 and "written again" in out and path.read_text() == text


def test_nothing_new_is_refused(talk):
    talk.file("rankings/train.jsonl", [{"id": f"r{i}", "prompt": f"prompt {i}", "responses": ["a", "b"],
                                        "ranks": [1, 2]} for i in range(8)])  # fmt: skip
    code, _, err = talk.rlhf()
    assert code == 2 and err.count("\n") == 1 and "nobody has given anything since" in err
    assert not (talk.folder / "talk-r2.yaml").exists() and not (talk.folder / "artifacts/talk-r2").exists()


def test_a_round_that_is_not_finished_is_refused(talk, monkeypatch):
    monkeypatch.setattr("stages.people.rounds.command.finished_policy", talk.really_finished)
    for stage in ("base", "sft", "rankings", "rm", "ppo"):
        (talk.base / stage / "manifest.json").unlink()
    code, _, err = talk.rlhf()
    assert code == 2 and "this round is not finished: ppo is missing" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["rounds={rankings: 0, prompts: 0}"], "rounds.prompts: demonstrations, rankings and prompts are all 0"),
        (["rounds.policy_from=last", "model.peft={}"], "rounds.policy_from: an adapter"),
        (["rounds.old.prompts=0"], "rounds.old.prompts: 0 leaves no row"),
        (["seed=3", "sweep={seed: [1, 2]}"], "sweep: a round follows one experiment"),
    ],
)
def test_settings_that_cannot_work_are_refused(talk, words, said):
    code, _, err = talk.rlhf(*words)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (talk.folder / "talk-r2.yaml").exists()


def test_clean_keeps_what_people_gave_to_a_round(talk):
    talk.rank("prompt 6")
    talk.rlhf()
    base = talk.folder / "artifacts/talk-r2"
    (base / "sft").mkdir()
    assert cli.main(["clean", "-c", "talk-r2.yaml", "--yes"]) == 0
    assert not (base / "sft").exists() and talk.rows("new_rankings.jsonl")
    assert "round/ stays" in talk.capture.readouterr().out
    assert cli.main(["clean", "-c", "talk-r2.yaml", "--yes", "--with-labels"]) == 0
    assert not base.exists()


def test_status_says_which_round_it_is_and_what_follows(talk):
    talk.rank("prompt 6")
    talk.rlhf()
    first, second = api.load_experiment("talk.yaml"), api.load_experiment("talk-r2.yaml")
    assert status_lines(talk.base, first) == ["round 2 follows: talk-r2"]
    (line,) = status_lines(talk.folder / "artifacts/talk-r2", second)
    assert line == "round 2, after talk: taken of people (rankings 1); 5 rankings of earlier rounds stay"


def test_status_says_what_changed_in_earlier_rounds(talk):
    talk.rlhf()
    second, base = api.load_experiment("talk-r2.yaml"), talk.folder / "artifacts/talk-r2"
    assert len(status_lines(base, second)) == 1
    (talk.base / "ppo/manifest.json").write_text(json.dumps({"digest": "another", "config": {}}))
    (talk.base / "rm/manifest.json").unlink()
    assert status_lines(base, second)[1] == "round 1: rm, ppo changed or went away since this round was made"
    talk.base.rename(talk.folder / "away")
    assert "artifacts/talk is not there" in status_lines(base, second)[1]


def test_a_round_whose_earlier_rounds_are_not_whole_is_refused(talk):
    talk.rank("prompt 6")
    database = talk.database()
    snapshots.take(talk.base, "talk", database)
    database.close()
    (talk.base / "rankings/manifest.json").unlink()
    code, _, err = talk.rlhf()
    assert code == 2 and err.count("\n") == 1 and "artifacts/talk/rankings: is not there any more" in err
    assert not (talk.folder / "artifacts/talk-r2").exists()
    talk.publish("rankings")
    assert talk.rlhf()[0] == 0
    config_of = talk.folder / "talk-r2.yaml"
    config_of.write_text(config_of.read_text().replace("- artifacts/talk\n", "- artifacts/elsewhere\n"))
    code, _, err = talk.rlhf(config="talk-r2.yaml")
    assert code == 2 and err.count("\n") == 1 and "round.earlier: no such folder: artifacts/elsewhere" in err
