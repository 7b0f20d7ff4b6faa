"""What the stages refuse before anything runs: lengths that cannot fit, kernels that cannot compute."""

import json
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from pipeline import api
from pipeline.config.validation import load_experiment
from pipeline.errors import UserError
from stages import world
from stages.settings import world as world_settings
from stages.settings.training import total_steps
from stages.shared.runtime import check_context

STAGES = api.stages()


def loaded(tmp_path, *overrides):
    (tmp_path / "a.yaml").write_text("name: a\n")
    return api.load_experiment(tmp_path / "a.yaml", *overrides)


def problems(tmp_path, *overrides):
    """The error lines of a config with these settings, without where they were written."""
    try:
        loaded(tmp_path, *overrides)
    except UserError as error:
        return [line.split(": ", 1)[1] for line in error.lines]
    return []


def test_the_defaults_suit_each_other(tmp_path):
    assert problems(tmp_path) == []
    assert problems(tmp_path, "model.peft={method: qlora, bits: 8}") == problems(tmp_path, "model.peft={}") == []


@pytest.mark.parametrize("stage", ["base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate"])
def test_a_length_over_the_context_of_a_model_from_scratch(tmp_path, stage):
    (line,) = problems(tmp_path, f"{stage}.max_length=513")
    assert line.startswith(f"{stage}.max_length: 513 tokens is more than the model's context of 512; ")
    assert problems(tmp_path, f"{stage}.max_length=513", "model.name_or_path=org/name") == []


@pytest.mark.parametrize("key", ["ppo.ptx_length", "evaluate.perplexity_length"])
def test_packed_rows_have_to_fit_too(tmp_path, key):
    assert problems(tmp_path, f"{key}=513")[0].startswith(f"{key}: 513 tokens is more than the model's context of 512")


CONTEXTS = [
    {"max_position_embeddings": 64},
    {"n_positions": 64},
    {"seq_length": 64},
    {"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8},
    {"text_config": {"hidden_size": 8}, "n_positions": 64},
]


@pytest.mark.parametrize("config", CONTEXTS)
def test_a_length_over_the_context_of_a_model_that_is_there(tmp_path, config):
    """Of another length only where the stage names it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = SimpleNamespace(max_length=64, ptx_length=65)
    session = SimpleNamespace(stage="ppo")
    check_context(session, lengths, tmp_path)
    with pytest.raises(UserError) as caught:
        check_context(session, lengths, tmp_path, "ptx_length")
    what = "65 tokens is more than the model's context of 64"
    assert caught.value.lines == [f"ppo.ptx_length: {what}; set ppo.ptx_length to 64 or less"]
    lengths.max_length = 70
    with pytest.raises(UserError) as caught:
        check_context(session, lengths, tmp_path, "ptx_length")
    assert [line.split(":")[0] for line in caught.value.lines] == ["ppo.max_length", "ppo.ptx_length"]


def test_all_lengths_over_a_given_models_context_are_told_before_anything_runs(tmp_path):
    """A folder's context is known at once: no stage may find it out after another has trained for hours."""
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    settings = (f"model.name_or_path={model}", "sft.max_length=64")
    experiment = experiment_of(tmp_path, *settings)
    for stage in ("rm", "dpo", "ppo", "evaluate"):
        first, length = STAGES[stage].missing_requirements(experiment)[0], getattr(experiment, stage).max_length
        what = f"{length} tokens is more than the model's context of 64"
        assert first == f"{stage}.max_length: {what}; set {stage}.max_length to 64 or less"
    assert lacks(tmp_path, "sft", *settings) == []
    (model / "config.json").unlink()
    assert [line for line in lacks(tmp_path, "rm", *settings) if "context" in line] == []


def test_a_model_that_names_no_context_is_not_checked(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": null}')
    check_context(SimpleNamespace(stage="ppo"), SimpleNamespace(max_length=10**6), tmp_path)


def test_evaluate_checks_the_length_of_its_packed_rows_too(tmp_path):
    (tmp_path / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "model" / "config.json").write_text('{"max_position_embeddings": 32}')
    lengths = ("evaluate.max_length=16", "evaluate.response_length=8", "evaluate.perplexity_length=33")
    experiment = loaded(tmp_path, "model.name_or_path=org/name", *lengths)
    ctx = SimpleNamespace(stage="evaluate", experiment=experiment, config=experiment.evaluate)
    ctx.inputs, ctx.trust_remote_code = {"sft": tmp_path / "sft"}, False
    ctx.seed, ctx.checkpoints, ctx.tracker, ctx.stop = 0, None, None, None
    with pytest.raises(UserError, match="evaluate.perplexity_length: 33 tokens is more than the model's context of 32"):
        STAGES["evaluate"].run(ctx)


@pytest.mark.parametrize("stage", ["rankings", "ppo", "evaluate"])
def test_a_response_has_to_leave_room_for_a_prompt(tmp_path, stage):
    (line,) = problems(tmp_path, f"{stage}.response_length=512")
    what = f"512 leaves no room for a prompt in {stage}.max_length 512"
    assert line == f"{stage}.response_length: {what}; lower {stage}.response_length or raise {stage}.max_length"


@pytest.mark.parametrize(
    "overrides, start",
    [
        (("dpo.loss_type=[sigmoid,sigmoid]",), "dpo.loss_type: "),
        (("dpo.loss_type=[]",), "dpo.loss_type: "),
        (
            ("dpo.loss_type=[sigmoid,sft]", "dpo.loss_weights=[1.0]"),
            "dpo.loss_weights: 1 given for 2 losses in dpo.loss_type",
        ),
        (("dpo.loss_type=hinge", "dpo.label_smoothing=0.1"), "dpo.label_smoothing: has no effect with"),
        (("rm.loss_type=plackett_luce", "rm.margin_coef=1.0"), "rm.margin_coef: has no effect"),
        (("model.peft.bits=8",), "model.peft.bits: 8 has no effect with method lora; use qlora, or "),
        (("model.peft.method=qlora", "launch.strategy=fsdp2"), "launch.strategy: fsdp2 shards float weights by "),
        (("model.peft.init_r=24",), "model.peft.init_r: 24 has no effect with method lora; use adalora, or leave it "),
        (
            ("model.peft.method=adalora", "model.peft.init_r=8"),
            "model.peft.init_r: 8 is lower than r 16, the rank that ",
        ),
        (("model.peft.method=adalora", "launch.strategy=fsdp2"), "launch.strategy: fsdp2 shards each weight by "),
        (("model.peft.method=p_tuning",), "model.peft.method: p_tuning learns vectors that are put before a prompt; "),
        (("ppo.reward_ensemble=min",), "evaluate.reward_ensemble: is mean and ppo.reward_ensemble is min"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, overrides, start):
    (line,) = problems(tmp_path, *overrides)
    assert line.startswith(start)


def test_losses_that_do(tmp_path):
    weighted = ("dpo.loss_type=[robust,sft]", "dpo.loss_weights=[1.0,0.2]", "dpo.label_smoothing=0.1")
    ensemble = ("rm.ensemble=3", "ppo.reward_ensemble=min", "evaluate.reward_ensemble=min")
    assert problems(tmp_path, *weighted, *ensemble, "rm.loss_type=plackett_luce") == []


def test_what_no_attention_can_compute(tmp_path):
    (line,) = problems(tmp_path, "model.hidden_size=12")
    assert line.startswith("model.num_attention_heads: the size of a head, 12 / 4 = 3, is odd; ")
    (line,) = problems(tmp_path, "model.attn_implementation=flash_attention_2")
    assert line.endswith("set model.dtype: bfloat16, or use sdpa")


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_batch_that_several_processes_cannot_share(tmp_path, stage):
    """base and sft take whole rows each; rm, dpo and ppo deal out whatever there is."""
    sizes = (f"{stage}.per_device_train_batch_size=3", f"{stage}.gradient_accumulation_steps=1")
    (line,) = problems(tmp_path, *sizes, "launch.processes=2")
    assert line.startswith(f"{stage}.per_device_train_batch_size: 3 times gradient_accumulation_steps 1 cannot")
    assert problems(tmp_path, *sizes) == []
    assert problems(tmp_path, sizes[0], f"{stage}.gradient_accumulation_steps=2", "launch.processes=2") == []


def test_accumulation_is_said_to_make_the_batch():
    """Twice the micro-batches are twice the batch, in half as many steps."""
    for name in ("base", "sft", "rm", "dpo"):
        config = STAGES[name].settings
        once, twice = (config(per_device_train_batch_size=2, gradient_accumulation_steps=n) for n in (1, 2))
        assert total_steps(once, 64) == 2 * total_steps(twice, 64)
        assert "not the gradient" not in config.model_fields["gradient_accumulation_steps"].description


def experiment_of(tmp_path, *settings):
    (tmp_path / "a.yaml").write_text("name: a\n")
    return load_experiment(tmp_path / "a.yaml", settings, api.experiment_class())


def lacks(tmp_path, stage, *settings):
    """What a stage says before anything runs."""
    return STAGES[stage].missing_requirements(experiment_of(tmp_path, *settings))


@pytest.mark.parametrize(
    "stage, kind, row",
    [
        ("base", "documents", {"text": "a"}),
        ("sft", "demonstrations", {"prompt": "a", "completion": "b"}),
        ("rankings", "rankings", {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}),
        ("rm", "demonstrations", {"prompt": "a", "completion": "b"}),
        ("ppo", "prompts", {"prompt": "a"}),
        ("evaluate", "evaluation_prompts", {"prompt": "a"}),
    ],
)
def test_a_file_that_cannot_be_read_is_told_before_anything_runs(tmp_path, stage, kind, row):
    file, other = tmp_path / "rows.jsonl", row | {next(iter(row)): "other"}

    def told(*rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return lacks(tmp_path, stage, f"data.{kind}={{path: {file}, skip: 1}}")

    assert told(row, other) == []
    assert [line.startswith(f"{file}:2: the key ") for line in told(row, {})] == [True]
    assert told(row) == [f"{file}: holds 1 records and skip passes over 1; lower skip"]
    assert lacks(tmp_path, stage, f"data.{kind}=org/name") == lacks(tmp_path, stage) == []  # the Hub, the world


def test_evaluate_compares_its_prompts_with_what_the_policies_trained_on(tmp_path):
    """Simulated rankings are of `prompts`; without PPO and with rankings of one's own nobody trains on those."""
    own = {kind: f"data.{kind}=org/{kind}" for kind in ("evaluation_prompts", "demonstrations", "prompts", "rankings")}
    without_ppo = "evaluate.policies=[sft,dpo]"
    world = ["evaluation_prompts", "documents", "demonstrations", "prompts"]
    asked = own["evaluation_prompts"]
    for settings, kinds in (
        ([], world),
        ([without_ppo], world),
        ([asked, "data.documents=world", "data.demonstrations=world", "data.prompts=world"], world),
        ([asked, own["demonstrations"]], ["evaluation_prompts", "demonstrations"]),
        ([own["demonstrations"]], ["demonstrations"]),
        ([asked, own["rankings"], without_ppo], ["evaluation_prompts", "demonstrations", "rankings"]),
        (own.values(), ["evaluation_prompts", "demonstrations", "rankings", "prompts"]),
    ):
        assert STAGES["evaluate"].reads(experiment_of(tmp_path, *settings)) == kinds


def test_vllm_has_to_be_there_where_ppo_runs(tmp_path):
    engine = "ppo.rollout.engine=vllm"
    assert problems(tmp_path, engine) == []
    (line,) = lacks(tmp_path, "ppo", engine)
    assert line.startswith("ppo.rollout.engine: vllm is not installed here; ") and "pip install vllm" in line
    (line,) = lacks(tmp_path, "ppo", engine, "launch.vllm.python=no/such/python")
    assert line.startswith("launch.vllm.python: no/such/python is not a program; ")
    assert lacks(tmp_path, "ppo", "launch.vllm.python=no/such/python") == []  # nobody asks for it
    assert lacks(tmp_path, "ppo", engine, "launch.vllm.python=python3") == []


ROOM = {"smollm2": 160, "qwen3-0.6b": 768, "llama3-8b": 1024, "llama3-70b": 1024}  # nearly all of their answers end
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_does_not_teach_length_first(path):
    """Room for whole answers, and a cut one worth less than nearly every finished one, of which scores are about
    standard normal; ppo and evaluate cut alike, and rm has read rows as long as it scores."""
    experiment = load_experiment(path, [], api.experiment_class())
    ppo, evaluate = experiment.ppo, experiment.evaluate
    assert ppo.missing_eos_score is not None and NormalDist().cdf(ppo.missing_eos_score) < 0.025
    for key in ("missing_eos_score", "response_length", "max_length", "temperature"):
        assert getattr(ppo, key) == getattr(evaluate, key), key
    assert experiment.rm.max_length >= ppo.max_length and experiment.dpo.max_length >= ppo.max_length
    assert (experiment.model.name_or_path is None) == (path.stem not in ROOM)
    assert ppo.response_length >= ROOM.get(path.stem, 0) and 0.05 <= ppo.ptx_coef <= 2.0


def test_a_world_without_so_many_prompts_is_told(tmp_path):
    sizes = world_settings.WorldSettings(documents=100, demonstrations=20, prompts=90_000)
    ctx = SimpleNamespace(config=sizes, experiment=SimpleNamespace(seed=0), publish=tmp_path)
    with pytest.raises(UserError, match=r"world\.prompts: \d+ prompts of the kind \w+ asked for, .* lower it"):
        world.run(ctx)
