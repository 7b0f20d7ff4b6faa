"""Test what the stages refuse before anything runs, such as lengths that cannot fit."""

import json
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest

from pipeline import api, fingerprints
from pipeline.config.validation import load_experiment
from pipeline.errors import UserError
from pipeline.stage import Source
from stages import world
from stages.settings import world as world_settings
from stages.settings.training import total_steps
from stages.shared.runtime import check_context
from tests.shipped import settings_for

STAGES = api.stages()


def loaded(tmp_path, *overrides):
    """Return the experiment of a config with these settings, checked."""
    (tmp_path / "a.yaml").write_text("name: a\n")
    return api.load_experiment(tmp_path / "a.yaml", *overrides)


def problems(tmp_path, *overrides):
    """Return the error lines of a config with these settings, without their location."""
    try:
        loaded(tmp_path, *overrides)
    except UserError as error:
        return [line.split(": ", 1)[1] for line in error.lines]
    return []


def test_the_defaults_fit_together(tmp_path):
    assert problems(tmp_path) == []
    assert problems(tmp_path, "model.peft={method: qlora, bits: 8}") == problems(tmp_path, "model.peft={}") == []


@pytest.mark.parametrize("stage", ["base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate"])
def test_a_length_over_the_context_of_a_model_from_scratch(tmp_path, stage):
    (line,) = problems(tmp_path, f"{stage}.max_length=513")
    assert line.startswith(f"{stage}.max_length: 513 tokens is more than the model's context of 512; ")
    assert problems(tmp_path, f"{stage}.max_length=513", "model.name_or_path=org/name") == []


@pytest.mark.parametrize("key", ["ppo.top_k", "ppo.rollout.top_p"])
def test_ppo_does_not_sample_from_truncated_distributions(tmp_path, key):
    (line,) = problems(tmp_path, f"{key}=1")
    assert f"{key}: unknown key; leave it out: PPO's ratios and KL are of whole distributions" in line


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
def test_a_length_over_the_context_of_a_loaded_model(tmp_path, config):
    """Lengths other than max_length are checked only if the stage names them."""
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


def test_all_lengths_over_a_local_models_context_are_reported_before_anything_runs(tmp_path):
    """A local model's context is known at once, so no earlier stage trains for hours first."""
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    settings = (f"model.name_or_path={model}", "sft.max_length=64")
    experiment = experiment_of(tmp_path, *settings)
    for stage in ("rm", "dpo", "ppo", "evaluate"):
        first, length = STAGES[stage].missing_requirements(experiment)[0], getattr(experiment, stage).max_length
        what = f"{length} tokens is more than the model's context of 64"
        assert first == f"{stage}.max_length: {what}; set {stage}.max_length to 64 or less"
    assert missing(tmp_path, "sft", *settings) == []
    (model / "config.json").unlink()
    assert [line for line in missing(tmp_path, "rm", *settings) if "context" in line] == []


def test_a_model_that_names_no_context_is_not_checked(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": null}')
    check_context(SimpleNamespace(stage="ppo"), SimpleNamespace(max_length=10**6), tmp_path)


def test_evaluate_checks_the_length_of_its_packed_rows_too(tmp_path):
    (tmp_path / "sft" / "model").mkdir(parents=True)
    (tmp_path / "sft" / "model" / "config.json").write_text('{"max_position_embeddings": 32}')
    lengths = ("evaluate.max_length=16", "evaluate.response_length=8", "evaluate.perplexity_length=33")
    experiment = loaded(tmp_path, "model.name_or_path=org/name", *lengths)
    ctx = SimpleNamespace(stage="evaluate", experiment=experiment, config=experiment.evaluate)
    ctx.inputs, ctx.sources, ctx.trust_remote_code = {"sft": tmp_path / "sft"}, {}, False
    ctx.seed, ctx.checkpoints, ctx.tracker, ctx.stop, ctx.publish = 0, None, None, None, tmp_path
    too_long = r"evaluate\.perplexity_length: 33 tokens is more than the model's context of 32"
    with pytest.raises(UserError, match=too_long):
        STAGES["evaluate"].run(ctx)


@pytest.mark.parametrize("stage", ["rankings", "ppo", "evaluate"])
def test_a_response_has_to_leave_room_for_a_prompt(tmp_path, stage):
    (line,) = problems(tmp_path, f"{stage}.response_length=512")
    what = f"512 leaves no room for a prompt in {stage}.max_length 512"
    assert line == f"{stage}.response_length: {what}; lower {stage}.response_length or raise {stage}.max_length"


PREFIX = ("model.peft.method=prefix_tuning", "model.max_position_embeddings=1024")


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
        (("model.peft.init_r=24",), "model.peft.init_r: 24 has no effect with method lora; use adalora, or leave it "),
        (
            ("model.peft.method=adalora", "model.peft.init_r=8"),
            "model.peft.init_r: 8 is lower than r 16, the rank that ",
        ),
        (("launch.offload=optimizer", "model.dtype=float16"), "launch.offload: optimizer steps other tensors than tho"),
        (("launch.shard=optimizer",), "launch.shard: has no effect with launch.strategy ddp; set launch.strategy: fsd"),
        (("launch.reduce=last",), "launch.reduce: has no effect where gradients are whole"),
        (
            ("launch.reduce=last", "launch.offload=all", "launch.strategy=fsdp2"),
            "launch.reduce: last keeps whole gradients on the device",
        ),
        (("launch.offload=all", "launch.processes=2"), "launch.offload: all shards the weights, and launch.strategy d"),
        (
            ("launch.offload=all", "launch.shard=optimizer", "launch.strategy=fsdp2"),
            "launch.offload: all shards the weights, and launch.shard optimizer keeps them whole",
        ),
        (
            ("model.peft.bottleneck_size=8",),
            "model.peft.bottleneck_size: 8 has no effect with method lora; use houlsby or pfeiffer or parallel_ad",
        ),
        (
            ("model.peft.method=houlsby", "model.peft.num_virtual_tokens=8"),
            "model.peft.num_virtual_tokens: 8 has no effect with method houlsby; use prompt_tuning or p_",
        ),
        (
            (*PREFIX, "model.peft.encoder_hidden_size=8"),
            "model.peft.encoder_hidden_size: 8 has no effect without the MLP; set prefix_projection: true",
        ),
        (
            (*PREFIX, "model.attn_implementation=eager"),
            "model.attn_implementation: eager cannot read the keys and values of a prefix",
        ),
        (
            ("launch.processes=4", "launch.tensor_parallel=3", "model.peft=null"),
            "launch.processes: 4 process(es) do not divide into groups of 3 (tensor_parallel 3); set a multiple of 3",
        ),
        (
            ("launch.processes=4", "launch.tensor_parallel=2", "model.peft.method=lora"),
            "launch.tensor_parallel: transformers' plans name the weights of a model without an adapter, and model.p",
        ),
        (
            ("launch.processes=4", "launch.tensor_parallel=2", "model.peft=null", "dpo.peft={method: lora}"),
            "launch.tensor_parallel: transformers' plans name the weights of a model without an adapter, and dpo.peft",
        ),
        (
            (*PREFIX, "launch.processes=2", "launch.context_parallel=2"),
            "launch.context_parallel: a prefix's keys come before those of the row",
        ),
        (("sft.packing=true", "launch.processes=2", "launch.context_parallel=2"), "sft.packing: rows that processes "),
        (
            ("sft.router_aux_loss_coef=0.01", "launch.processes=2", "launch.context_parallel=2"),
            "sft.router_aux_loss_coef: with launch.context_parallel each process would balance",
        ),
        (
            ("model.peft.method=houlsby", "ppo.rollout.engine=vllm"),
            "ppo.rollout.engine: vllm runs its own code of the model, which has no place for the adapter of houlsby",
        ),
        (
            ("model.peft.num_virtual_tokens=8",),
            "model.peft.num_virtual_tokens: 8 has no effect with method lora; use prompt_tuning or p_tuning or prefix",
        ),
        (
            ("model.peft.method=prompt_tuning", "model.peft.encoder_hidden_size=8"),
            "model.peft.encoder_hidden_size: 8 has no effect with method prompt_tuning; use p_tuning or prefix_",
        ),
        (
            ("model.peft.method=p_tuning", "model.peft.prompt_tuning_init=text"),
            "model.peft.prompt_tuning_init: text needs one; give it as prompt_tuning_init_text",
        ),
        (
            (
                "model.peft.method=p_tuning",
                "model.peft.prompt_tuning_init=random",
                "model.peft.prompt_tuning_init_text=Answer",
            ),
            "model.peft.prompt_tuning_init_text: has no effect with prompt_tuning_init random; use text",
        ),
        (("ppo.reward_ensemble=min",), "evaluate.reward_ensemble: is mean and ppo.reward_ensemble is min"),
        (
            ("ppo.rewards=[{model: rm, how: min}]",),
            "evaluate.reward_ensemble: is mean and ppo.rewards[0].how is min, so scores would not be",
        ),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, overrides, start):
    (line,) = problems(tmp_path, *overrides)
    assert line.startswith(start)


@pytest.mark.parametrize(
    "rewards, how",
    [
        ("[{model: rm, how: min}]", "min"),
        ("[{model: rm, weight: 0}, {model: rm, name: least, how: min}]", "min"),
        ("[{rule: words, at_most: 9}]", "min"),  # nothing of rm is climbed
    ],
)
def test_evaluate_combines_an_ensemble_as_ppo_does(tmp_path, rewards, how):
    settings = ("rm.ensemble=3", f"ppo.rewards={rewards}")
    assert problems(tmp_path, *settings, f"evaluate.reward_ensemble={how}") == []


def test_a_prefix_takes_of_the_context(tmp_path):
    """Not of that of the stage base, which trains none."""
    settings = (*PREFIX, "model.peft.num_virtual_tokens=10")
    assert problems(tmp_path, *settings, "base.max_length=1024", "sft.max_length=1014") == []
    (line,) = problems(tmp_path, *settings, "rm.max_length=1015")
    assert line.startswith("rm.max_length: 1015 tokens is more than the model's context of 1014 behind a prefix of 10")


@pytest.mark.parametrize(
    "overrides, start",
    [
        (["correction_clip_max=2.0"], "ppo.rollout.correction_clip_max: has no effect without a correction"),
        (["correction=none", "correction_outliers=mask"], "ppo.rollout.correction_outliers: has no effect"),
        (["correction=token", "correction_clip_min=3.5"], "ppo.rollout.correction_clip_min: 3.5 is not below"),
        (["correction=tokens"], "ppo.rollout.correction: "),
    ],
)
def test_a_correction_that_cannot_be(tmp_path, overrides, start):
    (line,) = problems(tmp_path, *(f"ppo.rollout.{setting}" for setting in overrides))
    assert line.startswith(start)


def test_corrections_that_can_be(tmp_path):
    assert loaded(tmp_path, "ppo.rollout.correction=none").ppo.rollout.correction is None
    for settings in ("{correction: token}", "{correction: sequence, correction_clip_max: 2, correction_clip_min: 0.5}"):
        assert problems(tmp_path, f"ppo.rollout={settings}") == []


def test_how_vllm_gets_weights_fits_where_it_runs_and_what_trains(tmp_path):
    engine = "ppo.rollout.engine=vllm"
    for settings in ("{hand_over: memory, devices: '1'}", "{hand_over: memory, tensor_parallel_size: 2}"):
        (line,) = problems(tmp_path, engine, f"launch.vllm={settings}")
        assert "launch.vllm.hand_over: memory works only on the GPU that the weights are on" in line
    for peft in ("null", "{method: dora}"):
        (line,) = problems(tmp_path, engine, "launch.vllm.adapter_alone=true", f"model.peft={peft}")
        assert "launch.vllm.adapter_alone: vLLM takes only LoRA" in line
        assert (
            problems(tmp_path, "launch.vllm.adapter_alone=true", f"model.peft={peft}") == []
        )  # the engine is not vllm
    fine = "launch.vllm={hand_over: memory, adapter_alone: true, sleep: true}"
    assert problems(tmp_path, engine, fine, "model.peft={method: lora}") == []
    (line,) = problems(tmp_path, engine, "launch.vllm.options={enable_lora: true}")
    assert "launch.vllm.options: ppo sets enable_lora itself" in line


def test_losses_that_fit_together(tmp_path):
    weighted = ("dpo.loss_type=[robust,sft]", "dpo.loss_weights=[1.0,0.2]", "dpo.label_smoothing=0.1")
    ensemble = ("rm.ensemble=3", "ppo.reward_ensemble=min", "evaluate.reward_ensemble=min")
    assert problems(tmp_path, *weighted, *ensemble, "rm.loss_type=plackett_luce") == []


def test_shapes_and_dtypes_that_no_attention_computes(tmp_path):
    (line,) = problems(tmp_path, "model.hidden_size=12")
    assert line.startswith("model.num_attention_heads: the size of a head, 12 / 4 = 3, is odd; ")
    (line,) = problems(tmp_path, "model.attn_implementation=flash_attention_2")
    assert line.endswith("set model.dtype: bfloat16, or use sdpa")


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_batch_that_several_processes_cannot_share(tmp_path, stage):
    """In base and sft each process takes whole rows; rm, dpo and ppo distribute any batch."""
    sizes = (f"{stage}.per_device_train_batch_size=3", f"{stage}.gradient_accumulation_steps=1")
    (line,) = problems(tmp_path, *sizes, "launch.processes=2")
    assert line.startswith(f"{stage}.per_device_train_batch_size: 3 times gradient_accumulation_steps 1 cannot")
    assert problems(tmp_path, *sizes) == []
    assert problems(tmp_path, sizes[0], f"{stage}.gradient_accumulation_steps=2", "launch.processes=2") == []


def test_accumulation_multiplies_the_batch():
    """Twice the micro-batches give twice the batch, in half as many steps."""
    for name in ("base", "sft", "rm", "dpo"):
        config = STAGES[name].settings
        once, twice = (config(per_device_train_batch_size=2, gradient_accumulation_steps=n) for n in (1, 2))
        assert total_steps(once, 64) == 2 * total_steps(twice, 64)
        assert "not the gradient" not in config.model_fields["gradient_accumulation_steps"].description


def experiment_of(tmp_path, *settings):
    """Return the experiment of a config with these settings, without the stages' checks."""
    (tmp_path / "a.yaml").write_text("name: a\n")
    return load_experiment(tmp_path / "a.yaml", settings, api.experiment_class())


def missing(tmp_path, stage, *settings):
    """Return the missing requirements of a stage."""
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
def test_an_unreadable_file_is_reported_before_anything_runs(tmp_path, stage, kind, row):
    file, other = tmp_path / "rows.jsonl", row | {next(iter(row)): "other"}

    def problems_of(*rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert kind in STAGES[stage].reads(experiment_of(tmp_path, f"data.{kind}={file}"))
        return STAGES[stage].check_data(kind, Source(path=file, skip=1), lambda rows, share: None)

    assert problems_of(row, other) == []
    assert [line.startswith(f"{file}:2: the key ") for line in problems_of(row, {})] == [True]
    assert problems_of(row) == [f"{file}: has 1 records, and skip leaves out the first 1; lower skip"]
    assert problems_of(*[row, other] * 150, {}) != []  # the whole file is read


def test_evaluate_compares_its_prompts_with_what_the_policies_trained_on(tmp_path):
    """Without PPO and with given rankings, no policy is trained on `prompts`."""
    own = {kind: f"data.{kind}=org/{kind}" for kind in ("evaluation_prompts", "demonstrations", "prompts", "rankings")}
    without_ppo = "evaluate.policies=[sft,dpo]"
    world = ["evaluation_prompts", "documents", "demonstrations", "prompts"]
    prompts = own["evaluation_prompts"]
    for settings, kinds in (
        ([], world),
        ([without_ppo], world),
        ([prompts, "data.documents=world", "data.demonstrations=world", "data.prompts=world"], world),
        ([prompts, own["demonstrations"]], ["evaluation_prompts", "demonstrations"]),
        ([own["demonstrations"]], ["demonstrations"]),
        ([prompts, own["rankings"], without_ppo], ["evaluation_prompts", "demonstrations", "rankings"]),
        (own.values(), ["evaluation_prompts", "demonstrations", "rankings", "prompts"]),
    ):
        assert STAGES["evaluate"].reads(experiment_of(tmp_path, *settings)) == kinds


def test_vllm_has_to_be_installed_where_ppo_runs(tmp_path):
    engine = "ppo.rollout.engine=vllm"
    assert problems(tmp_path, engine) == []
    (line,) = missing(tmp_path, "ppo", engine)
    assert line.startswith("ppo.rollout.engine: vllm is not installed here; ") and "pip install vllm" in line
    (line,) = missing(tmp_path, "ppo", engine, "launch.vllm.python=no/such/python")
    assert line.startswith("launch.vllm.python: no/such/python is not a program; ")
    assert missing(tmp_path, "ppo", "launch.vllm.python=no/such/python") == []  # the engine is not vllm
    assert missing(tmp_path, "ppo", engine, "launch.vllm.python=python3") == []


# tokens within which nearly all responses of these models end
ROOM = {"smollm2": 160, "smollm2-preferences": 160, "qwen3-0.6b": 768, "llama3-8b": 1024, "llama3-70b": 1024}
ROOM["sentiment"] = 40  # measured: 99.8 % of the demonstrations
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BY_RULE = "rule-reward"  # its reward is no model's, and asks for short answers


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != BY_RULE], ids=lambda path: path.stem)
def test_a_shipped_config_does_not_teach_length_first(path, tmp_path):
    """Whole responses fit, and a truncated one scores less than nearly every finished one.

    Scores of finished responses are about standard normal. ppo and evaluate truncate alike, and rm
    trains on rows as long as those that it scores.
    """
    experiment = load_experiment(path, settings_for(path, tmp_path), api.experiment_class())
    ppo, evaluate = experiment.ppo, experiment.evaluate
    assert ppo.missing_eos_score is not None and NormalDist().cdf(ppo.missing_eos_score) < 0.025
    for key in ("missing_eos_score", "response_length", "max_length", "temperature"):
        assert getattr(ppo, key) == getattr(evaluate, key), key
    assert experiment.rm.max_length >= ppo.max_length and experiment.dpo.max_length >= ppo.max_length
    assert (experiment.model.name_or_path is None) == (path.stem not in ROOM)
    assert ppo.response_length >= ROOM.get(path.stem, 0) and 0.05 <= ppo.ptx_coef <= 2.0


def test_the_config_with_a_rule_needs_no_rankings():
    """A cut answer scores as one that follows nothing, and ppo and evaluate cut alike."""
    experiment = load_experiment(CONFIGS[0].parent / f"{BY_RULE}.yaml", [], api.experiment_class())
    ppo, evaluate = experiment.ppo, experiment.evaluate
    assert fingerprints.all_needs(api.stages()["ppo"], experiment) == ["sft"] and experiment.data.rankings is None
    assert ppo.missing_eos_score == 0.0
    for key in ("missing_eos_score", "response_length", "max_length", "temperature"):
        assert getattr(ppo, key) == getattr(evaluate, key), key


def test_more_prompts_than_the_world_has_are_refused(tmp_path):

    sizes = world_settings.WorldSettings(documents=100, demonstrations=20, prompts=90_000)
    ctx = SimpleNamespace(config=sizes, experiment=SimpleNamespace(seed=0), publish=tmp_path)
    with pytest.raises(UserError, match=r"world\.prompts: \d+ prompts of the kind \w+ asked for, .* lower it"):
        world.run(ctx)
