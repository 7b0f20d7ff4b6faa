"""Check which stages an experiment has by its data, and what is said of the others."""

import pytest

from pipeline import api, cli
from pipeline.chain import Chain, assess
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore

STAGES = api.stages()
MODEL = "name_or_path: org/model"


@pytest.fixture
def closure(tmp_path):
    """Return closure(target, data, *settings) → the stages that the target needs, in their order.

    Where there is a UserError, its lines are returned. data: kinds of which the user gives a file;
    "kind=world" and "kind=null" are possible too.
    """

    def found(target, data, *settings, model=MODEL):
        experiment = loaded(tmp_path, data, *settings, model=model)
        try:
            return Chain(experiment, ArtifactStore(tmp_path / "artifacts", "a"), STAGES).closure(target)
        except UserError as error:
            return error.lines

    return found


def loaded(tmp_path, data, *settings, model=MODEL):
    lines = []
    for kind in data.split():
        name, _, value = kind.partition("=")
        (tmp_path / f"{name}.jsonl").touch()
        lines.append(f"  {name}: {value or tmp_path / f'{name}.jsonl'}")
    text = "\n".join(["name: a", f"model: {{{model}}}", "data:", *lines])
    (tmp_path / "a.yaml").write_text(text + "\n")
    return api.load_experiment(tmp_path / "a.yaml", *settings)


SFT = ["base", "sft"]
RANKED = [*SFT, "rankings"]


@pytest.mark.parametrize(
    "target, data, stages",
    [
        ("sft", "demonstrations", SFT),
        ("dpo", "demonstrations rankings", [*RANKED, "dpo"]),
        ("rm", "demonstrations rankings", [*RANKED, "rm"]),
        ("evaluate", "demonstrations", [*SFT, "evaluate"]),
        ("report", "demonstrations", [*SFT, "evaluate", "report"]),
        ("report", "demonstrations rankings", [*RANKED, "dpo", "evaluate", "report"]),
        ("report", "demonstrations rankings evaluation_prompts", [*RANKED, "dpo", "evaluate", "report"]),
        ("report", "demonstrations documents evaluation_prompts", [*SFT, "evaluate", "report"]),
        ("sft", "demonstrations documents=null prompts=null evaluation_prompts=null", SFT),
    ],
)
def test_a_stage_asks_only_for_the_data_that_it_and_its_inputs_read(closure, target, data, stages):
    assert closure(target, data) == stages


def test_a_whole_chain_stays_whole(closure):
    """With all kinds of data given, or the world's, no stage is left out."""
    own = "documents demonstrations prompts evaluation_prompts rankings"
    whole = ["base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report"]
    assert closure("report", own) == whole
    assert closure("report", "documents=world", model="") == ["world", *whole]
    fewer = closure("report", own, "evaluate.policies=[base,sft,dpo]")
    assert fewer == [stage for stage in whole if stage != "ppo"]  # rm judges where the data allow PPO, as it did


def test_a_reward_model_is_trained_as_a_judge_where_best_of_n_is_named(closure):
    data = "demonstrations rankings evaluation_prompts"
    found = closure("evaluate", data, "evaluate.policies=[sft,dpo,best_of_n]")
    assert found == [*RANKED, "rm", "dpo", "evaluate"]


def test_a_reward_model_from_outside_needs_no_rankings(closure, tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    given = (f"ppo.reward_model={tmp_path}/judge", "ppo.ptx_coef=0")
    assert closure("ppo", "demonstrations prompts", *given) == [*SFT, "ppo"]
    assert closure("ppo", "demonstrations prompts rankings", *given) == [*RANKED, "rm", "ppo"]


@pytest.mark.parametrize(
    "target, data, settings, lines",
    [
        (
            "ppo",
            "demonstrations prompts rankings",
            (),
            [
                "data.documents: none is given, and ppo reads it; give a file or a Hub id, or set ppo.ptx_coef: 0, "
                "which leaves out the pretraining gradient"
            ],
        ),
        (
            "sft",
            "demonstrations",
            ("sft.ppo_init={}",),
            ["data.documents: none is given, and sft reads it; give a file or a Hub id, or set sft.ppo_init: null"],
        ),
        (
            "dpo",
            "demonstrations prompts",
            (),
            [
                "data.rankings: none is given, and rankings reads it; give a file or a Hub id, or set rankings.scorer "
                "(scorers rank), or data.prompts: world (simulated labelers know only the embedded world's prompts)"
            ],
        ),
        ("dpo", "rankings", (), ["data.demonstrations: none is given, and sft reads it; give a file or a Hub id"]),
        (
            "evaluate",
            "demonstrations rankings",
            ("evaluate.policies=[sft,ppo]", "ppo.ptx_coef=0"),
            ["data.prompts: none is given, and ppo reads it; give a file or a Hub id"],
        ),
    ],
)
def test_all_missing_requirements_are_reported_with_alternatives(closure, target, data, settings, lines):
    assert closure(target, data, *settings) == lines


def test_a_model_from_scratch_needs_documents(closure):
    (line,) = closure("sft", "demonstrations", model="")
    assert line == (
        "data.documents: none is given, and base reads it; give a file or a Hub id, or start from a base model: "
        "model.name_or_path"
    )


def test_own_data_never_meet_the_worlds_unasked(tmp_path):
    given = loaded(tmp_path, "demonstrations").data
    assert (given.documents, given.prompts, given.evaluation_prompts) == (None, None, None)
    assert loaded(tmp_path, "demonstrations prompts=world").data.prompts == "world"
    assert loaded(tmp_path, "documents=world").data.prompts == "world"
    assert loaded(tmp_path, "documents=null").data.prompts == "world"


def test_status_says_what_a_stage_would_need(tmp_path):
    experiment = loaded(tmp_path, "demonstrations")
    states = assess(experiment, ArtifactStore(tmp_path / "artifacts", "a"), STAGES)
    assert states["ppo"].sentence() == "missing because data.prompts: none is given; data.documents: none is given"
    assert states["sft"].sentence() == "missing"


def test_a_report_with_only_demonstrations_and_rankings(chain, tmp_path, monkeypatch, capsys):
    """From the command line: SFT and DPO are trained and compared, and nothing else is."""
    settings = {
        "sft": "max_steps: 1, max_length: 64, sample_tokens: 0, per_device_train_batch_size: 2",
        "dpo": "max_steps: 1, max_length: 64, sample_tokens: 0, per_device_train_batch_size: 2",
        "evaluate": "response_length: 6, max_length: 90, batch_size: 4",
        "rankings": "validation_fraction: 0.3",
        "launch": "device: cpu, threads: 1",
    }
    config = [
        "name: part",
        f"model: {{name_or_path: {chain.root}/base/model}}",
        f"data: {{demonstrations: {chain.root}/demonstrations.jsonl, rankings: {chain.root}/rankings.jsonl,",
        "  validation_fraction: 0.3}",
        *(f"{section}: {{{text}}}" for section, text in settings.items()),
    ]
    (tmp_path / "part.yaml").write_text("\n".join(config) + "\n")
    command = ["-c", str(tmp_path / "part.yaml"), "--artifacts", str(tmp_path / "artifacts")]
    assert cli.main(["run", "report", *command]) == 0
    made = {path.name for path in (tmp_path / "artifacts" / "part").glob("[!.]*")}
    assert made == {"base", "sft", "rankings", "dpo", "evaluate", "report"}
    page = (tmp_path / "artifacts" / "part" / "report" / "index.html").read_text(encoding="utf-8")
    assert "DPO" in page and "PPO" not in page.partition("<main>")[2].partition("Lineage")[0]
    said = capsys.readouterr()
    assert "no reward model judged" in said.out and "None" not in page
    assert cli.main(["run", "ppo", *command]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == ["data.prompts", "data.documents"]
    assert "set ppo.ptx_coef: 0" in errors[1]
