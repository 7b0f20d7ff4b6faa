"""Invent an experiment for the report's tests, with plausible curves and hostile samples."""

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from pipeline import api
from stages import report
from stages.evaluation import overoptimisation
from stages.evaluation.judges import Judge
from stages.evaluation.results import Measured, order_by_gold, summarise
from stages.page import curves, gains
from stages.page.drawing import Picture
from stages.page.plot import Plot
from stages.settings import report as report_settings

MADE_OF = {
    "world": "",
    "base": "world",
    "sft": "world base",
    "rankings": "world sft",
    "rm": "world sft rankings",
    "ppo": "world sft rm",
    "dpo": "sft rankings",
    "evaluate": "world base sft rm ppo dpo",
}
HOSTILE = '</div><script>alert("x")</script><img src=x onerror=alert(1)> & ünïcode 😀 \u202e'


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


TRUST = {  # of the reward model
    "reliability": [
        {"confidence": 0.55, "accuracy": 0.53, "n_pairs": 900},
        {"confidence": 0.75, "accuracy": 0.72, "n_pairs": 1212},
    ],
    "accuracy_by_k": {"4": {"accuracy": 0.7, "accuracy_ci95": [0.67, 0.73], "n_pairs": 2112}},
    "accuracy_by_rank_distance": {"1": {"accuracy": 0.61, "n_pairs": 1100}, "2": {"accuracy": 0.8, "n_pairs": 1012}},
    "accuracy_by_labeler": {"ada<b>": {"accuracy": 0.7, "n_pairs": 2112}},
    "agreement_by_labelers": {"ada<b> / ben": {"agreement": 0.72, "n_pairs": 812}},
}


RIGHT = {"accuracy": 0.704, "accuracy_ci95": [0.68, 0.73], "n_pairs": 2112}  # of a judge
GIT = "abcdef0123456789abcdef0123456789abcdef01"
RECORDED = {  # of the common sections; what differs from the defaults is shown
    "model": {"name_or_path": "org/small", "hidden_size": 128, "revision": "9" * 40, "asked_revision": "main",
              "peft": {"method": "lora", "r": 8, "lora_alpha": 32, "target_modules": "all-linear"}},
    "checkpoints": {"every": 25, "keep": 2},
    "launch": {"device": "auto", "threads": None, "processes": 1},
}  # fmt: skip
OWN = {"sft": {"learning_rate": 0.0002, "num_train_epochs": 3.0}, "ppo": {"kl_coef": 0.1, "gamma": 1.0}}


def fake_run(
    tmp_path: Path,
    policies: tuple[str, ...] = ("base", "sft", "ppo", "dpo", "best_of_n"),
    gold: bool = True,
    world: bool = True,
    prompts: int = 40,
    held_out: bool = False,
    kept: bool = False,
    reward_model: bool = True,
    system: Callable[[int], str | None] = lambda i: "be kind" if i == 0 else None,
) -> SimpleNamespace:
    """Return a StageRun over an invented tree of artifacts.

    Args:
        tmp_path: Where the tree is written.
        policies: The policies that were evaluated.
        gold: Whether there is a gold scorer.
        world: Whether data come from the embedded world; otherwise from files.
        prompts: The number of evaluation prompts.
        held_out: Whether rm trained a held-out model.
        kept: Whether rm trained a judge on rankings kept for it.
        reward_model: Whether there is a reward model; without one, nothing is scored.
        system: Index of a prompt → its system prompt, or None.
    """
    rng = random.Random(0)
    stages = [
        s
        for s in report_settings.STAGES
        if s in {"base", "sft", "rankings", "rm", "evaluate"} | set(policies) or (s == "world" and world)
        if s != "rm" or reward_model
    ]
    inputs, manifests = {}, {}
    for i, stage in enumerate(stages):
        inputs[stage] = tmp_path / "artifacts" / "fake" / stage
        inputs[stage].mkdir(parents=True)
        manifests[stage] = {
            "stage": stage,
            "digest": f"{i:064x}"[::-1],
            "inputs": {s: manifests[s]["digest"] for s in MADE_OF[stage].split() if s in manifests},
            "started_at": f"2026-11-23T10:{i:02d}:00+00:00",
            "finished_at": f"2026-11-23T10:{i:02d}:41+00:00",
            "seed": 0,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "git": {"commit": GIT, "dirty": i == 2},
            "resumes": 0,
            "world_size": 1,
            "threads": 2,
            "device": "NVIDIA H200",
            "strategy": None,
            "hardware": {"cpu": "Some CPU", "cores": 16, "memory_gb": 128.0, "devices": 2, "device_memory_gb": 150.1},
            "command": "rlhf run report -c mine.yaml ppo.kl_coef=0.1",
            "outputs": {"model/model.safetensors": {"sha256": "0" * 64, "bytes": 4_400_000}},
            "metrics": {"rm": TRUST, "base": {"parameters": 135_000_000}, "sft": {"rows": 95}}.get(stage, {}),
            "config": RECORDED | {stage: OWN.get(stage, {})} | {"data": data_of(stage, world)}
            | ({"overridden": {"ppo.kl_coef": [0.05, 0.1]}} if stage == "ppo" else {}),
        }  # fmt: skip
    if "world" in manifests:
        manifests["world"]["metrics"] = {"documents": 15_000, "demonstrations": 3000, "evaluation_prompts": prompts}
    noise = lambda s: rng.gauss(0, s)  # noqa: E731
    for stage in (s for s in ("base", "sft", "rm", "dpo") if s in stages):
        keys = {"rm": ("accuracy", "margin"), "dpo": ("rewards/chosen", "rewards/rejected")}.get(stage, ("lr",))
        row = lambda s, keys=keys: {  # noqa: E731
            "step": s,
            "loss": 0.6 + 5 * math.exp(-s / 20) + abs(noise(0.05)),
            **{k: 0.5 + s / 400 + noise(0.02) for k in keys},
        }
        write_rows(inputs[stage] / "metrics.jsonl", [row(s) for s in range(1, 121)])
        write_rows(inputs[stage] / "evaluations.jsonl", [row(s) for s in range(0, 121, 30)])
    if "ppo" in stages:
        names = {trace.metric for text in curves.PPO for trace in text.traces}
        write_rows(
            inputs["ppo"] / "metrics.jsonl",
            [
                {
                    "step": s,
                    "episode": 64 * s,
                    **{k: 0.02 + s / 80 + abs(noise(0.1)) for k in names},
                    "val/explained_variance": "NaN",
                }
                for s in range(1, 81)
            ],
        )
        write_rows(
            inputs["ppo"] / "evaluations.jsonl",
            [{"step": s, "score": s / 40, "kl": s / 10, "entropy": 1.0} for s in range(0, 81, 20)],
        )
        write_rows(
            inputs["ppo"] / "samples.jsonl",
            [
                {"step": s, "prompt": "name a fox .", "response": HOSTILE, "score": 0.5, "kl": 1.0}
                for s in range(0, 81, 20)
                for _ in range(4)
            ],
        )
    strength = {"base": -2.0, "sft": 0.0, "ppo": 1.2, "dpo": 0.8, "best_of_n": 1.6}
    lines, all_measured = [], {}
    known = [i % 2 == 0 for i in range(prompts)]
    for name in policies:
        rows = []
        for i in range(prompts):
            for k in range(1 if name == "best_of_n" else 2):
                score = strength[name] + noise(1.0)
                good = min(1.0, max(0.0, 0.62 + 0.15 * score + noise(0.15)))
                said = HOSTILE if i == 0 else f"prompt {i}"
                told = [{"role": "system", "content": system(i)}, {"role": "user", "content": said}]
                prompt = said if system(i) is None else told
                rows.append(
                    {
                        "policy": name,
                        "prompt": prompt,
                        "sample": k,
                        "response": HOSTILE if i % 7 == 0 else f"answer {i} of {name}",
                        "finished": k == 0 or i % 2 == 0,
                        "score": score,
                        "length": 10 + i % 7,
                    }
                    | ({"judges": {"kept": score * 2}} if kept else {})
                    | ({"gold": dict.fromkeys(gains.PARTS, good), "cluster": str(i // 3)} if gold else {})
                )
        lines += rows
        each = len(rows) // prompts

        def column(key, rows=rows, each=each):
            return [[row[key] for row in rows[i * each : (i + 1) * each]] for i in range(prompts)]

        all_measured[name] = Measured(
            asked="plain" if name == "base" else "chat",
            responses=column("response"),
            finished=column("finished"),
            scores={"reward_model": column("score")}
            | ({"kept": [[x * 2 for x in row] for row in column("score")]} if kept else {})
            | ({"held_out": [[x / 2 for x in row] for row in column("score")]} if held_out else {}),
            kl=None if name == "best_of_n" else [[abs(strength[name]) * 4] * each] * prompts,
            lengths=column("length"),
            raw_scores=column("score"),
            gold=column("gold") if gold else None,
            text_losses=None if name == "best_of_n" else [0.8, 0.9, 0.95],
        )
    judges = [Judge("reward_model", frozenset({"ppo", "best_of_n"}) & set(policies), frozenset({"best_of_n"}), RIGHT)]
    judges = [Judge("kept", figures=RIGHT | {"rankings": 800}), *judges] if kept else judges
    judges = [*judges, Judge("held_out", figures=RIGHT)] if held_out else judges
    judges = [Judge("gold"), *judges] if gold else judges
    results = {
        name: summarise(
            name, own, all_measured["sft"], [i // 3 for i in range(prompts)], known if gold else None, judges
        )
        for name, own in all_measured.items()
    }
    checks = {
        n: overoptimisation.check(own, all_measured["sft"], [i // 3 for i in range(prompts)])
        for n, own in all_measured.items()
    }
    write_rows(inputs["evaluate"] / "responses.jsonl", lines)
    write_rows(
        inputs["evaluate"] / "greedy.jsonl",
        [
            {"policy": row["policy"], "index": 0, "prompt": row["prompt"], "response": f"greedy {row['policy']}",
             "finished": True, "length": 3, "score": 0.5}
            for row in lines if row["sample"] == 0 and row["policy"] != "best_of_n"
        ],
    )  # fmt: skip
    figures = {
        "accuracy": 0.704,
        "accuracy_ci95": [0.68, 0.73],
        "accuracy_ceiling": 0.733 if world else None,
        "n_pairs": 2112,
        "labeler_agreement": 0.726 if world else None,
        "ece": 0.021,
        "orders_as_gold": order_by_gold(
            "reward_model", all_measured["sft"], [str(i // 3) for i in range(prompts)], known
        )
        if gold
        else None,
    }
    (inputs["evaluate"] / "results.json").write_text(
        json.dumps(
            {
                "judge": judges[0].kind,
                "judge_name": judges[0].name,
                "judges": {
                    judge.name: judge.figures | {"climbed": sorted(judge.climbed), "selected": sorted(judge.selected)}
                    for judge in judges
                },
                "leaked": sum(known) if gold else 0,
                "leaked_by": "task" if gold else "near copy",
                "prompts": prompts,
                "samples_per_prompt": 2,
                "clusters": -(-prompts // 3),
                "policies": results,
                "reward_model": figures,
                "overoptimisation": checks,
                "missing_eos_score": -1.0,
                "response_length": 32,
            }
        )
    )
    publish = tmp_path / "artifacts" / "fake" / "report"
    publish.mkdir()
    experiment = api.experiment_class()(name="fake", evaluate={"best_of": 16, "policies": list(policies)})
    return SimpleNamespace(
        experiment=experiment,
        config=report_settings.ReportSettings(),
        seed=0,
        inputs=inputs,
        manifests=manifests,
        publish=publish,
    )


def page_of(ctx: SimpleNamespace, *, with_plots: bool = False) -> str:
    """Return the page.

    Args:
        ctx: The run.
        with_plots: Whether plots are drawn, which takes seconds; otherwise pictures are empty.
    """
    if with_plots:
        report.run(ctx)
    else:
        with mock.patch.object(report, "picture", empty_picture):
            report.run(ctx)
    return (ctx.publish / "index.html").read_text(encoding="utf-8")


def empty_picture(plot: Plot, folder: Path | None = None) -> Picture:
    """Return a picture of nothing in place of a drawn plot."""
    return Picture(plot, f'<svg role="img" aria-labelledby="{plot.name}"><title id="{plot.name}">empty</title></svg>')


def data_of(stage: str, world: bool) -> dict:
    """Return what a stage's manifest records of its data."""
    kinds = {"sft": ["demonstrations"], "rm": ["demonstrations"], "rankings": [] if world else ["rankings"],
             "evaluate": ["evaluation_prompts", "documents"]}.get(stage, [])  # fmt: skip
    found = {kind: {"path": "world" if world else f"/home/me/data/{kind}.jsonl", "rows": 1234} for kind in kinds}
    return found | {"validation_fraction": 0.05}


def without_a_judge(ctx: SimpleNamespace) -> None:
    """Remove from the results what SFT and DPO without PPO lack: scores and a reward model."""
    gone = ("score", "pretrain_perplexity", "win_rate_vs_sft", "difference_to_sft", "gold", "gold_known_tasks",
            "gold_held_out_tasks", "judge_climbed", "judges")  # fmt: skip
    file = ctx.inputs["evaluate"] / "results.json"
    results = json.loads(file.read_text())
    for policy in results["policies"].values():
        for key in gone:
            policy.pop(key)
        policy["ci95"].pop("score")
        for key in ("score", "pretrain_perplexity"):
            (policy["differences_to_sft"] or {}).pop(key, None)
    results |= {"judge": None, "judge_name": None, "judges": {}, "overoptimisation": dict.fromkeys(results["policies"])}
    results.pop("reward_model")
    file.write_text(json.dumps(results))
    for name in ("responses", "greedy"):
        rows = report.read_rows(ctx.inputs["evaluate"] / f"{name}.jsonl")
        write_rows(ctx.inputs["evaluate"] / f"{name}.jsonl",
                   [{k: v for k, v in row.items() if k not in ("score", "gold")} for row in rows])  # fmt: skip
