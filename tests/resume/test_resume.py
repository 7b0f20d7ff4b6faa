"""Test that a chain that is killed once in each stage ends with the bytes of an undisturbed one."""

import itertools
import json
import shutil

import pytest
import torch
from resume_worker import CONFIG, copy_without, published, rlhf
from safetensors.torch import load_file, save_file

from data.world.world import World
from stages.training.schedule import learning_rate_at

STAGES = ("base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")
JOURNALS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")


@pytest.mark.parametrize(
    "stage, step", [*[(stage, 5) for stage in STAGES], ("sft", 9), ("sft", 11), ("rm", 9), ("rm", 11)]
)
def test_killed_and_resumed_it_gives_the_same_bytes(stage, step, oracle, tmp_path):
    """Kill after the checkpoint of step 4 and before that of 6.

    For sft also early and late in the training of ppo_init/, for rm in that of its second model.
    """
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    step = {"rankings": 2, "evaluate": 2}.get(stage, step)
    assert rlhf(*run, die=(stage, step)) == -9
    assert not (root / "micro" / stage / "manifest.json").exists()
    assert list((root / "micro" / stage / "checkpoints").glob("step-*/manifest.json"))
    encoded = times_of(root / "micro" / stage)
    assert rlhf(*run) == 0
    assert bool(encoded) == (stage in ("sft", "rm", "ppo", "dpo")) and times_of(root / "micro" / stage) == encoded
    assert published(root / "micro" / stage) == published(oracle / "micro" / stage)
    assert json.loads((root / "micro" / stage / "manifest.json").read_text())["resumes"] == 1


def times_of(folder):
    """Return when each file of encoded rows in a stage's cache was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / ".cache").glob("*.arrow")}


@pytest.mark.parametrize(
    "stage, file",
    [
        ("sft", "demonstrations.arrow"),
        ("sft", "demonstrations.json"),
        ("rm", "groups-train.index"),
        ("dpo", "groups-validation.json"),
    ],
)
def test_killed_while_encoded_rows_are_kept_it_gives_the_same_bytes(stage, file, oracle, tmp_path):
    """Also where the rows of an earlier entry are replaced, and its JSON file is not yet."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, f"{stage}.max_length=72", die=(stage, 1)) == -9
    assert rlhf(*run, "--restart", die=(stage, file)) == -9
    assert rlhf(*run, "--restart") == 0
    assert published(root / "micro" / stage) == published(oracle / "micro" / stage)
    assert not list((root / "micro" / stage / ".cache").glob(".tmp*"))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


OWN_BASE = [
    "rm.base={vocab_size: 320, hidden_size: 24, num_attention_heads: 3, max_position_embeddings: 160, "
    "sft: {max_length: 160}}",
    "rm.max_length=160",
]


@pytest.fixture(scope="module")
def own_base(oracle, tmp_path_factory):
    """Return the chain up to ppo with a reward model of another size and another tokenizer."""
    root = copy_without(oracle, tmp_path_factory.mktemp("own_base"), "rm")
    assert rlhf("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), *OWN_BASE) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm_base", "rm_sft", "rm", "ppo"])
def test_with_a_base_of_the_reward_models_own_it_resumes_to_the_same_bytes(stage, own_base, tmp_path):
    root = copy_without(own_base, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *OWN_BASE)
    assert rlhf(*run, die=(stage, 5)) == -9
    assert list((root / "micro" / stage / "checkpoints").glob("step-*/manifest.json"))
    assert rlhf(*run) == 0
    assert published(root / "micro" / stage) == published(own_base / "micro" / stage)


@pytest.mark.slow
def test_dropout_and_noise_resume_to_the_same_bytes(oracle, tmp_path):
    """Each step draws by its number, also in the training of ppo_init."""
    drawn = ["sft.dropout=0.2", "sft.neftune_noise_alpha=5.0", "sft.label_smoothing=0.1"]
    outcomes = []
    for die in (None, ("sft", 5), ("sft", 11)):
        root = copy_without(oracle, tmp_path / str(die), "sft")
        run = ("run", "sft", "-c", str(CONFIG), "--artifacts", str(root), "--only", *drawn)
        if die is not None:
            assert rlhf(*run, die=die) == -9
        assert rlhf(*run) == 0
        outcomes.append(published(root / "micro" / "sft"))
    assert outcomes[0] == outcomes[1] == outcomes[2] != published(oracle / "micro" / "sft")


@pytest.mark.parametrize("packing", ["true", pytest.param("null", marks=pytest.mark.slow)])
def test_packed_rows_resume_to_the_same_bytes(packing, oracle, tmp_path):
    """Here `null` packs too: so large a micro-batch has many logits."""
    drawn = ["sft.dropout=0.2", "sft.ppo_init=null"]
    if packing == "null":
        drawn += ["sft.per_device_train_batch_size=256", "sft.gradient_accumulation_steps=1"]
    outcomes = []
    for setting, die in ((packing, None), (packing, ("sft", 5)), ("false", None)):
        root = copy_without(oracle, tmp_path / f"{setting}-{die}", "sft")
        run = ("run", "sft", "-c", str(CONFIG), "--artifacts", str(root), "--only", *drawn, f"sft.packing={setting}")
        if die is not None:
            assert rlhf(*run, die=die) == -9
        assert rlhf(*run) == 0
        outcomes.append(published(root / "micro" / "sft"))
    assert outcomes[0] == outcomes[1] != outcomes[2]


@pytest.mark.parametrize("stage", ["sft", *map(slow, ("base", "rm", "dpo"))])
def test_changed_settings_apply_from_the_checkpoint_on(stage, oracle, tmp_path):
    """Also in the further trainings of sft and rm, which count their own steps.

    Weight decay puts weights into other groups of rm's and dpo's optimizer.
    """
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    today = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 3, "weight_decay": 0.1}
    assert rlhf(*run, die=(stage, 5)) == -9
    assert rlhf(*run, *(f"{stage}.{key}={value}" for key, value in today.items()), "--override-config") == 0
    usual, rows = (
        [json.loads(line) for line in (x / "micro" / stage / "metrics.jsonl").open()] for x in (oracle, root)
    )
    assert rows[:4] == usual[:4] and len(rows) == len(usual)
    rates = lambda first, steps: [learning_rate_at(s, steps, 2e-4, "linear", 3) for s in range(first, steps + 1)]  # noqa: E731
    further = {"sft": (5,), "rm": (8, 3)}.get(stage, ())  # PPO's start; the held-out reward model and the judge
    assert [row["lr"] for row in rows[4:]] == rates(5, 8) + [rate for steps in further for rate in rates(1, steps)]
    assert rows[4]["loss"] == usual[4]["loss"] and rows[5]["loss"] != usual[5]["loss"]


@pytest.mark.parametrize("stage, shorter", [("ppo", "total_episodes=48"), ("dpo", "max_steps=6")])
def test_a_run_that_ends_at_its_checkpoint_keeps_the_best(stage, shorter, oracle, tmp_path):
    """It has kept no best weights until then: the present ones are the best."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, f"{stage}.keep=last", die=(stage, 7)) == -9
    assert rlhf(*run, f"{stage}.keep=best", f"{stage}.{shorter}", "--override-config") == 0
    assert json.loads((root / "micro" / stage / "manifest.json").read_text())["metrics"]["best_step"] == 6


def test_a_held_out_reward_model_is_logged_and_selects(oracle, tmp_path):
    """Its score is beside the other's, and `keep: best` goes by it."""
    root = copy_without(oracle, tmp_path, "ppo")
    judge = oracle / "micro" / "rm" / "ensemble" / "1"
    options = [f"ppo.held_out_reward_model={judge}", "ppo.missing_eos_score=null", "evaluate.missing_eos_score=null"]
    assert rlhf("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", *options) == 0
    rows = [json.loads(line) for line in (root / "micro" / "ppo" / "evaluations.jsonl").open()]
    scores = {row["step"]: row["held_out_score"] for row in rows}
    assert len(scores) > 2 and all(row["held_out_score"] != row["score"] for row in rows)
    metrics = json.loads((root / "micro" / "ppo" / "manifest.json").read_text())["metrics"]
    assert metrics["best_step"] == max(scores, key=scores.get)


REWARD = """
def score(responses, finished):
    return [len(set(response.split())) + 0.5 * ended for response, ended in zip(responses, finished)]
"""
GROUPED = ["ppo.kl_target=null", "ppo.kl_horizon=10000", "ppo.value_learning_rate=9e-6"]


@pytest.mark.parametrize(
    "settings", [["ppo.advantage=rloo"], ["ppo.advantage=grpo", "ppo.rewards=[{python: 'FILE:score'}]"]]
)
def test_without_a_value_model_it_resumes_to_the_same_bytes(settings, oracle, tmp_path):
    """Also where a function of the user scores, and no reward model."""
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    given = [text.replace("FILE", str(tmp_path / "reward.py")) for text in [*GROUPED, *settings]]
    if "rewards" in given[-1]:
        given += ["ppo.reward_ensemble=mean", "evaluate.reward_ensemble=mean"]
    outcomes = []
    for die in (None, ("ppo", 5)):
        root = copy_without(oracle, tmp_path / str(die is None), "ppo")
        run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", *given)
        if die is not None:
            assert rlhf(*run, die=die) == -9
        assert rlhf(*run) == 0
        outcomes.append(published(root / "micro" / "ppo"))
    assert outcomes[0] == outcomes[1] and not any("value_model" in str(name) for name in outcomes[0])


def test_scores_that_are_not_finite_are_skipped_or_stop_the_run(oracle, tmp_path):
    """Each update's row has the same figures as any other, without values; nothing is learned."""
    root = copy_without(oracle, tmp_path, "ppo")
    broken = tmp_path / "broken"
    shutil.copytree(oracle / "micro" / "rm" / "model", broken)
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", f"ppo.reward_model={broken}")
    assert rlhf(*run) == 3
    assert rlhf(*run, "ppo.max_skipped_steps=8", "ppo.keep=last", "--restart") == 0
    folder = root / "micro" / "ppo"
    rows_of = lambda x: [json.loads(line) for line in (x / "metrics.jsonl").open()]  # noqa: E731
    rows, usual = rows_of(folder), rows_of(oracle / "micro" / "ppo")
    assert [row.keys() for row in rows] == [row.keys() for row in usual]
    start, end = (load_file(x / "model.safetensors") for x in (root / "micro" / "sft" / "ppo_init", folder / "model"))
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_journals_have_each_step_once(oracle):
    """No row has a time but PPO's eps (episodes per second); the rest is compared above."""
    for stage in ("base", "sft", "rm", "ppo", "dpo"):
        rows = [json.loads(line) for line in (oracle / "micro" / stage / "metrics.jsonl").open()]
        manifest = json.loads((oracle / "micro" / stage / "manifest.json").read_text())
        # rm's two models, and its judge, which makes as many passes over fewer rankings
        steps = (16 + 3 if stage == "rm" else 8) + manifest["metrics"].get("ppo_init_steps", 0)
        assert steps > 8 or stage != "sft"
        assert [row["step"] for row in rows] == list(range(1, steps + 1)), stage
        for name in JOURNALS[1:]:
            assert (oracle / "micro" / stage / name).exists() or (stage, name) == ("base", "samples.jsonl")


def test_samples_have_prompts_as_in_the_file(oracle):
    prompts = {json.loads(line)["prompt"] for line in (oracle / "micro" / "world" / "prompts.jsonl").open()}
    for stage in ("rm", "ppo"):
        rows = [json.loads(line) for line in (oracle / "micro" / stage / "samples.jsonl").open()]
        assert rows and {row["prompt"] for row in rows} <= prompts


def test_evaluation_prompts_seen_in_training_are_reported(oracle, tmp_path):
    """In the embedded world by task, however it is worded; elsewhere by near copies.

    Here these are all prompts of the demonstrations with other white space, and one that resembles
    none of them.
    """
    rows = lambda kind: [json.loads(line) for line in (oracle / "micro" / "world" / f"{kind}.jsonl").open()]  # noqa: E731
    world = World.from_json(json.loads((oracle / "micro" / "world" / "world.json").read_text()))
    trained = {world.task(row["prompt"]) for kind in ("demonstrations", "prompts") for row in rows(kind)}
    corpus = "\n".join(row["text"] for row in rows("documents"))
    trained |= {task for request, task in world.language.requests().items() if request in corpus}
    prompts = [row["prompt"] for row in rows("evaluation_prompts")]
    known = sum(world.task(prompt) in trained for prompt in prompts)
    assert 0 < known <= len(prompts) // 2

    old = [row["prompt"] for row in rows("demonstrations")]
    asked = tmp_path / "asked.jsonl"
    new = "sing of ships that sail far away in winter ?"
    asked.write_text("".join(json.dumps({"prompt": f"  {prompt}"}) + "\n" for prompt in [*old, new]))
    root = copy_without(oracle, tmp_path, "evaluate")
    data = [f"data.{kind}=world" for kind in ("documents", "demonstrations", "prompts")]
    data += [f"data.evaluation_prompts={asked}", "evaluate.on_too_long=drop", "evaluate.best_of=2"]
    assert rlhf("run", "evaluate", "-c", str(CONFIG), "--artifacts", str(root), "--only", *data) == 0
    for home, leaked, by, count in (
        (oracle, known, "task", len(prompts)),
        (root, len(set(old)), "near copy", len(set(old)) + 1),
    ):
        folder = home / "micro" / "evaluate"
        metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
        assert (metrics["leaked"], metrics["prompts"]) == (leaked, count)
        results = json.loads((folder / "results.json").read_text())
        assert (results["leaked"], results["leaked_by"]) == (leaked, by)
        climbed = {name for name, policy in results["policies"].items() if policy["judge_climbed"]}
        if by == "task":
            assert results["judge"] == "gold" and not climbed
            assert all(policy["gold_held_out_tasks"] for policy in results["policies"].values())
        else:  # the kept judge; PPO climbed the reward model, which selects best of n
            assert results["judge"] == "reward_model" and results["judge_name"] == "kept" and not climbed
            by_reward_model = {name: policy["judges"]["reward_model"] for name, policy in results["policies"].items()}
            assert {name for name, one in by_reward_model.items() if one["climbed"]} == {"ppo", "best_of_n"}
            assert by_reward_model["best_of_n"]["win_rate_vs_sft"] is None


def test_ppo_starts_from_ppo_init_and_publishes_its_average(oracle):
    """Its reference is the other SFT model; kl_coef follows kl_target by Ziegler's rule."""
    load = lambda *parts: load_file(oracle.joinpath("micro", *parts) / "model.safetensors")  # noqa: E731
    start, sft, last, average = (
        load(*parts) for parts in (("sft", "ppo_init"), ("sft", "model"), ("ppo", "model"), ("ppo", "model_ema"))
    )
    distance = lambda a, b: sum((a[n] - b[n]).norm().item() ** 2 for n in a) ** 0.5  # noqa: E731
    assert 0 < distance(average, start) < min(distance(average, sft), distance(last, start))
    rows = [json.loads(line) for line in (oracle / "micro" / "ppo" / "metrics.jsonl").open()]
    assert abs(rows[0]["objective/kl"]) < 0.05 and rows[0]["kl_coef"] == 0.02
    for row, following in itertools.pairwise(rows):
        error = min(max(row["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * 8 / 64))


def test_the_reward_models_of_an_ensemble_have_biases_of_their_own(oracle):
    """With rm.ensemble: 2, each has a bias with which demonstrations score 0 on average.

    Accuracy is reported for each of them.
    """
    folders = [oracle / "micro" / "rm" / name for name in ("model", "ensemble/1")]
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert set(one) == set(other) and not any(one[n].equal(other[n]) for n in one if one[n].dim() == 2)
    biases = [json.loads((folder / "config.json").read_text())["reward_bias"] for folder in folders]
    assert biases[0] != biases[1]
    metrics = json.loads((oracle / "micro" / "rm" / "manifest.json").read_text())["metrics"]
    for key in ("accuracy_by_k", "accuracy_by_rank_distance", "accuracy_by_labeler"):
        parts = metrics[key].values()
        assert sum(part["n_pairs"] for part in parts) == metrics["n_pairs"], key
        weighted = sum(part["accuracy"] * part["n_pairs"] for part in parts)
        assert weighted == pytest.approx(metrics["accuracy"] * metrics["n_pairs"]), key
    assert sum(bin["n_pairs"] for bin in metrics["reliability"]) == metrics["n_pairs"]
    assert 0 <= metrics["ensemble_accuracy"] <= 1


def test_reference_log_probabilities_are_cached(oracle, tmp_path):
    """A redo of dpo with another beta finds them in its cache, by model and rankings."""
    root = tmp_path / "artifacts"
    shutil.copytree(oracle, root)
    cached = sorted((root / "micro" / "dpo" / ".cache").glob("*.safetensors"))  # beside encoded rankings
    assert [path.stem for path in cached] == ["reference_logps_train", "reference_logps_validation"]
    before = [path.stat().st_mtime_ns for path in cached]
    assert rlhf("run", "dpo", "-c", str(CONFIG), "--artifacts", str(root), "--only", "dpo.beta=0.3") == 0
    assert [path.stat().st_mtime_ns for path in cached] == before


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_no_checkpoint_is_saved_after_patience_ended(stage, oracle, tmp_path):
    """A run that resumed from a checkpoint of that step would take another step."""
    root = copy_without(oracle, tmp_path, stage)
    worse = [f"{stage}.patience=1", f"{stage}.eval_steps=2", f"{stage}.learning_rate=5", "sft.ppo_init=null"]
    assert rlhf("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *worse) == 0
    folder = root / "micro" / stage
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert rows[-1] % 2 == 0 and rows[-1] < 8, "patience was to end it at a step that is due"
    saved = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert f"step-{rows[-1]:08d}" not in saved


def test_without_regular_checkpoints_the_second_training_restarts(oracle, tmp_path):
    """With checkpoints.every: 0, the only checkpoint is the signal's, of the first training."""
    root = copy_without(oracle, tmp_path, "sft")
    run = ("run", "sft", "-c", str(CONFIG), "--artifacts", str(root), "--only", "checkpoints.every=0")
    assert rlhf(*run, term=("sft", 3)) == 75
    assert rlhf(*run) == 0
    assert published(root / "micro" / "sft") == published(oracle / "micro" / "sft")


def test_prompts_of_the_world_with_other_demonstrations(oracle, tmp_path):
    """The reward model knows the tasks of ranked prompts; the file's prompts count as seen.

    Here the file contains each of the evaluation prompts, so that none is held out.
    """
    root = copy_without(oracle, tmp_path, "sft")
    prompts = [json.loads(line)["prompt"] for line in (root / "micro/world/evaluation_prompts.jsonl").open()]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"prompt": p, "completion": "the fox is red ."}) + "\n" for p in prompts))
    data = [f"data.{kind}=world" for kind in ("documents", "prompts", "evaluation_prompts")]
    options = [f"data.demonstrations={own}", "evaluate.policies=[sft]", "evaluate.reward_ensemble=mean"]
    assert rlhf("run", "evaluate", "-c", str(CONFIG), "--artifacts", str(root), *data, *options) == 0
    results = json.loads((root / "micro/evaluate/results.json").read_text())
    assert results["leaked"] == results["prompts"] == len(prompts)
    assert results["policies"]["sft"]["gold_held_out_tasks"] is None
    trust = json.loads((root / "micro/rm/manifest.json").read_text())["metrics"]
    assert trust["n_pairs"] > trust["n_clusters"] > 1


@pytest.mark.parametrize(
    "stage, step, loss", [("rm", 5, "davidson_luce"), ("rm", 11, "davidson"), ("dpo", 5, "[davidson, sft]")]
)
def test_learned_tie_strengths_are_resumed(stage, step, loss, oracle, tmp_path):
    """They are in the checkpoint with their optimizer, and not in the published weights."""
    own = ["rm.label_smoothing=0"] if stage == "rm" else []
    options = [f"{stage}.loss_type={loss}", f"{stage}.keep=best", f"{stage}.weight_decay=0.1", *own]
    roots = [copy_without(oracle, tmp_path / name, stage) for name in ("whole", "killed")]
    for root in roots:
        run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *options)
        if root is roots[1]:
            assert rlhf(*run, die=(stage, step)) == -9
        assert rlhf(*run) == 0
    assert published(roots[0] / "micro" / stage) == published(roots[1] / "micro" / stage)
    folder = roots[1] / "micro" / stage
    assert all("ties" not in name for name in load_file(folder / "model" / "model.safetensors"))
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").open()]
    strengths = [row["tie_strength"] for row in evaluations]
    assert len(set(strengths)) > 2, "nothing was learned"
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["tie_strength"] == pytest.approx(metrics["tie_strengths"][0])


@pytest.mark.slow
def test_kto_is_resumed_to_the_same_bytes(oracle, tmp_path):
    """Its estimate of the KL takes the whole batch, and is in no checkpoint."""
    roots = [copy_without(oracle, tmp_path / name, "dpo") for name in ("whole", "killed")]
    for root in roots:
        options = ("dpo.loss_type=kto", "dpo.loss_weights=null", "dpo.undesirable_weight=0.1", "dpo.keep=best")
        run = ("run", "dpo", "-c", str(CONFIG), "--artifacts", str(root), "--only", *options)
        if root is roots[1]:
            assert rlhf(*run, die=("dpo", 5)) == -9
        assert rlhf(*run) == 0
    assert published(roots[0] / "micro" / "dpo") == published(roots[1] / "micro" / "dpo")
    rows = [json.loads(line) for line in (roots[1] / "micro/dpo/metrics.jsonl").open()]
    assert any(row["kl"] > 0 for row in rows) and all(row["kl"] >= 0 for row in rows)
