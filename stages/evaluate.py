"""Measure every policy on the evaluation prompts, and compare the policies: results.json.

Policies are sampled at `evaluate.temperature`. The judge is the gold scorer in the embedded world,
otherwise the reward model that no policy climbed (rankings kept for it train it in rm), otherwise
the one that PPO climbs; if the data allow none, nothing is scored. Without documents no perplexity
is computed. best_of_n is the one of n SFT samples that the reward model scores highest.
A base model that never saw the chat template is prompted in plain text (`evaluation/forms.py`).
Intervals are over tasks in the embedded world, otherwise over prompts (`evaluation/statistics.py`).
Three checks of over-optimisation need no gold scorer (`evaluation/overoptimisation.py`), and some
prompts are answered greedily for people to read (`evaluation/greedy.py`).
One model at a time is on the device: the policies answer one after the other, then the reference
and each judge read all answers (`evaluation/turns.py`).
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.records import own_text, prompt_key
from data.sources import load
from data.turns import learnt_prompts
from data.world.world import World
from pipeline.stage import Source, StageRun
from pipeline.tracking import json_value
from stages.evaluation.climbed import Climbed, judges_of, judges_of_settings
from stages.evaluation.comparison import compare, manifest_figures
from stages.evaluation.forms import Form, form_of_base
from stages.evaluation.greedy import greedy_length, greedy_rows
from stages.evaluation.leaked import find_leaked_tasks, find_near_copies
from stages.evaluation.panel import Opinion, Panel, judge_all, people_by_models, peoples_pairs, with_opinions
from stages.evaluation.panel_results import panel_figures
from stages.evaluation.prompts import EvaluationPrompts, choose_examples, choose_records, row_of, split_demonstrations
from stages.evaluation.results import Measured
from stages.evaluation.rounds import folders_of, measure_rounds
from stages.evaluation.selecting import make_selector
from stages.evaluation.tools import Tools, load_tools, make_sampler
from stages.evaluation.turns import Work, measure_all
from stages.evaluation.writing import response_rows, write_jsonl
from stages.settings.checks import context_of
from stages.settings.evaluate import (
    JUDGE_REPEAT,
    STAGES,
    EvaluateSettings,
    difference_lines,
    differences_from_training,
    prompt_kind,
    text_lengths,
    training_prompt_kinds,
)
from stages.settings.experiment import Experiment
from stages.settings.policies import climbs_own_model, compared_policies, has_rankings, ranks_by_scorers
from stages.settings.ppo import climbed_folders
from stages.shared.encoded_documents import load_held_out_text
from stages.shared.inputs import (
    LengthLimit,
    fit_prompts,
    load_placed_records,
    load_records,
    published,
    read_world,
    stream_records,
)
from stages.shared.runtime import Runtime, check_context, runtime_of, with_accelerator
from stages.training.session import Session, session_of


def run(ctx: StageRun[EvaluateSettings, Experiment]) -> dict:
    """Measure every policy on the same prompts, and compare them.

    Publishes results.json, responses.jsonl (every sample with its scores) and greedy.jsonl.

    Returns:
        The figures for the manifest.
    """
    settings, experiment = ctx.config, ctx.experiment
    session = session_of(ctx, trains=False)

    # 1. Load the judges, the prompts and the held-out pretraining text.
    tools, prompts, text_rows = prepare(settings, experiment, session, runtime_of(ctx), ctx.inputs, ctx.sources)
    names = [name for name in STAGES if name in ctx.inputs]
    if settings.best_of > 1 and "best_of_n" in compared_policies(experiment):
        names.append("best_of_n")
        tools = with_selector(ctx, session, tools, prompts)
    for line in missing_figures(experiment, judged="rm" in ctx.inputs):
        session.say(line)

    # 2. Let each policy answer, then each model say what it makes of the answers.
    work = Work(session, total=len(names) + 1 + len(tools.judges) + len(settings.named_judges))
    measured = measure_all(work, tools, prompts, text_rows, settings, names, experiment)

    # 3. Let the judges of the settings judge, with a checkpoint after each; then greedy answers for
    # the report.
    tools.one.drop()
    measured, panel, opinions = ask_judges(ctx, work, tools, prompts, measured)
    poll = partial(session.leave_if_requested, work.total - 1, work.total)
    context = context_in(ctx.inputs["sft"] / "model")
    greedy = greedy_rows(tools, prompts, measured, settings, context, poll)
    tools.sampler.close()

    # 4. Compare, and publish.
    rm_figures = ctx.manifests["rm"]["metrics"] if "rm" in ctx.manifests else {}
    rm, climbed = ctx.inputs.get("rm"), climbed_by_ppo(experiment)
    further = judges_of_settings(names, settings.named_judges, experiment.ppo.rewards or [], rm, climbed)
    judges = judges_of(names, prompts.world is not None, rm, climbed, rm_figures, further)
    if judges and judges[0].climbed:
        session.say(
            f"warning: {' and '.join(sorted(judges[0].climbed))} climbed the only judge, the reward model, so it "
            f"overrates them; rankings.judge_fraction keeps rankings for a judge that nothing climbs"
        )
    panel_results = None
    if panel is not None:
        people_scores = people_by_models(tools, prompts.world, panel.people)
        panel_results = panel_figures(measured, prompts.clusters, opinions, panel.people, people_scores)
    results = compare(prompts, measured, judges, rm_figures, panel_results) | {
        "missing_eos_score": settings.missing_eos_score,
        "response_length": settings.response_length,
        "temperature": settings.temperature,
        **({} if tools.selector is None else {"best_of_by": tools.selector.name}),
        "differs_from_training": differences_from_training(experiment),
    }
    for line in difference_lines(results["differs_from_training"]):
        session.say(f"warning: {line}")
    text = json.dumps(json_value(results), indent=1) + "\n"
    (ctx.publish / "results.json").write_text(text, encoding="utf-8")
    rows = response_rows(prompts.prompts, prompts.clusters, prompts.leaked, measured)
    write_jsonl(ctx.publish / "responses.jsonl", rows)
    write_jsonl(ctx.publish / "greedy.jsonl", greedy)
    if experiment.round is not None:
        for line in publish_rounds(ctx, tools, prompts, measured, results["judge_name"], poll):
            session.say(line)
    return manifest_figures(results, "ppo" if "ppo" in names else names[-1]) | session.notes.figures


def publish_rounds(
    ctx: StageRun[EvaluateSettings, Experiment],
    tools: Tools,
    prompts: EvaluationPrompts,
    measured: dict[str, Measured],
    judge: str | None,
    poll: Callable[[], None],
) -> list[str]:
    """Write rounds.json: this round against the rounds before it.

    Args:
        ctx: The run.
        tools: The judges, and how models are loaded.
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        judge: The judge that decides; None: nobody.
        poll: Called between two models; raises if the run is to stop.

    Returns:
        A line for each figure that cannot be measured.
    """
    settings = ctx.experiment.round
    assert settings is not None, "there is an earlier round"
    figures = measure_rounds(
        settings,
        folders_of(settings, ctx.inputs, ctx.experiment.name),
        tools,
        prompts,
        measured,
        judge=judge,
        temperature=ctx.config.temperature,
        poll=poll,
    )
    ctx.confirm_folders()  # those of earlier rounds have been read
    text = json.dumps(json_value(figures), indent=1) + "\n"
    (ctx.publish / "rounds.json").write_text(text, encoding="utf-8")
    return figures["notes"]


def with_selector(
    ctx: StageRun[EvaluateSettings, Experiment], session: Session, tools: Tools, prompts: EvaluationPrompts
) -> Tools:
    """Return the tools with what chooses the best of n samples, if that is not the reward model."""
    if ctx.config.best_of_by is None:
        return tools
    selector = make_selector(
        ctx.config.best_of_by,
        prompts,
        tools.tokenizer,
        accelerator=tools.accelerator,
        batch_size=ctx.config.batch_size,
        records=session.checkpoints.folder / "scores",
        poll=partial(session.leave_if_requested, 0, len(STAGES)),
        trust_remote_code=ctx.trust_remote_code,
    )
    return dataclasses.replace(tools, selector=selector)


def ask_judges(
    ctx: StageRun[EvaluateSettings, Experiment],
    work: Work,
    tools: Tools,
    prompts: EvaluationPrompts,
    measured: dict[str, Measured],
) -> tuple[dict[str, Measured], Panel | None, dict[str, Opinion]]:
    """Let the judges of the settings judge the measured policies, with a checkpoint after each.

    Args:
        ctx: The run.
        work: The run, and what is done of it.
        tools: The tokenizer, and where models run.
        prompts: The evaluation prompts.
        measured: What was measured of each policy.

    Returns:
        The same with what the judges said of each; the panel, None without judges; and what each
        judge said.
    """
    settings, session = ctx.config, work.session
    named = settings.named_judges
    if not named:
        return measured, None, {}
    rankings = []
    if "rankings" in ctx.inputs:
        rankings = load("rankings", published(ctx.inputs["rankings"] / "validation.jsonl"))
    panel = Panel(
        settings=named,
        people=peoples_pairs(
            rankings, tools.tokenizer, count=settings.pairs_to_judge, max_length=settings.max_length, seed=session.seed
        ),
        repeat=JUDGE_REPEAT if settings.judge_repeat is None else settings.judge_repeat,
        records=session.checkpoints.folder / "scores",
        seed=session.seed,
        say=session.say,
        trust_remote_code=ctx.trust_remote_code,
    )
    checkpoint = session.checkpoints.newest()
    before = {} if checkpoint is None else checkpoint.state
    opinions = {name: Opinion(**state) for name, state in before.get("judged", {}).items()}
    with session.tracker.progress(len(named), "judges", len(opinions)) as progress:
        for name in named:
            if name in opinions:
                work.finish(None)
                continue
            opinions[name] = judge_all(panel, name, tools, prompts, measured, work.poll())
            progress.update(len(opinions))
            judged = {judge: opinion.state() for judge, opinion in opinions.items()}
            work.finish({"answered": before["answered"], "judged": judged})
    for name in named:
        if opinions[name].invalid:
            session.say(f"warning: {name}: {opinions[name].invalid} of {opinions[name].asked} verdicts are not valid")
    return with_opinions(measured, opinions), panel, opinions


def prepare(
    settings: EvaluateSettings,
    experiment: Experiment,
    session: Session,
    runtime: Runtime,
    inputs: dict[str, Path],
    sources: dict[str, Source],
) -> tuple[Tools, EvaluationPrompts, list[list[int]]]:
    """Load what every policy is measured with.

    Args:
        settings: The section evaluate.
        experiment: All settings.
        session: The run: its seed, and where lines go.
        runtime: How the stage computes.
        inputs: The artifact folder of each upstream stage.
        sources: Where each kind of data is.

    Returns:
        The tools, the evaluation prompts, and packed rows of documents that base and PPO-ptx did
        not train on (no rows without documents).
    """
    # 1. The judges.
    check_context(session, settings, inputs["sft"] / "model", *text_lengths(experiment))
    runtime = with_accelerator(runtime)
    has_ppo_init, on_too_long = experiment.sft.ppo_init is not None, experiment.rm.on_too_long
    tools = load_tools(session, runtime, inputs, settings, has_ppo_init, on_too_long)

    # 2. The prompts that leave room for a response. Without evaluation prompts: those of the
    # demonstrations that sft holds out.
    kind, fraction = prompt_kind(experiment), experiment.data.validation_fraction
    from_sft = kind == "demonstrations"
    records, locations = choose_records(
        *load_placed_records(kind, sources[kind], session.notes),
        limit=settings.num_prompts,
        fraction=fraction if from_sft else None,
        say=session.say,
    )
    limit = LengthLimit(settings.max_length, settings.on_too_long, session.stage)
    kept, chat_ids, report = fit_prompts(
        tools.tokenizer, (record.prompt for record in records), locations, limit, settings.response_length
    )
    session.say(report.line("evaluation prompts"))
    if from_sft:
        session.say(
            "data.evaluation_prompts is not set, so the prompts are those of the demonstrations that sft holds out; "
            "a file with more prompts makes intervals narrower"
        )
    texts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in (records[i].prompt for i in kept)]
    own_texts = [own_text(records[i]) for i in kept]

    # 3. What training data knows of them.
    demonstrations: Iterable = stream_records("demonstrations", sources["demonstrations"])
    if from_sft:
        known = list(demonstrations)
        demonstrations = (known[i] for i in split_demonstrations(known, fraction)[0])
    turns = experiment.sft.turns
    trained: dict[str, Iterable] = {
        "demonstrations": (text for one in demonstrations for text in learnt_prompts([one], turns))
    }
    for other in training_prompt_kinds(experiment):
        if other != "demonstrations":
            trained[other] = map(own_text, stream_records(other, sources[other]))
    world = World.from_json(read_world(inputs)) if getattr(experiment.data, kind) == "world" else None
    if world is None:
        leaked = find_near_copies(own_texts, trained, session.say)
    else:
        documents = load_records("documents", sources["documents"]) if experiment.data.documents is not None else []
        leaked = find_leaked_tasks(texts, trained, world, [document.text for document in documents], session.say)

    # 4. Examples for a few-shot question, and held-out text.
    examples = []
    if settings.base_prompt == "few_shot" and "base" in inputs:
        examples = choose_examples(
            load_records("demonstrations", sources["demonstrations"]), settings.few_shot_examples, session.seed
        )
    context = context_in(inputs["sft"] / "model")
    text_rows = []
    if experiment.data.documents is not None:
        length, most = settings.perplexity_length, settings.perplexity_rows
        text_rows = load_held_out_text(sources["documents"], fraction, tools.tokenizer, length, most)

    prompts = EvaluationPrompts(
        prompts=texts,
        chat_ids=chat_ids,
        # wordings of one row are one observation
        clusters=[prompt_key(own) if world is None else str(world.task(own)) for own in own_texts],
        leaked=leaked,
        rows=[row_of(records[i]) for i in kept],
        world=world,
        examples=examples,
        room=None if context is None else context - settings.response_length,
    )
    forms: list[Form] = ["chat"]
    if "base" in inputs:
        forms.append(form_of_base(settings.base_prompt, experiment.model.name_or_path))
    longest = longest_row(prompts, tools.tokenizer, forms, settings, context)
    sampler = make_sampler(tools, settings, runtime, experiment.launch, session, longest)
    tools = dataclasses.replace(tools.with_asked(chat_ids, texts), sampler=sampler)
    return tools, prompts, text_rows


def longest_row(
    prompts: EvaluationPrompts, tokenizer: Any, forms: Sequence[Form], settings: EvaluateSettings, context: int | None
) -> int:
    """Return the tokens of the longest prompt with a response, greedy ones included.

    Args:
        prompts: The evaluation prompts.
        tokenizer: Their tokenizer.
        forms: The forms in which policies are prompted.
        settings: The section evaluate.
        context: The longest row the models can read, in tokens; None if that is unknown.
    """
    longest = max(len(query.ids) for form in set(forms) for query in prompts.queries(tokenizer, form))
    length = max(settings.response_length, greedy_length(settings))
    row = max(settings.max_length, longest + length)
    return row if context is None else min(row, context)


def context_in(folder: Path) -> int | None:
    """Return the context of the model in a folder, in tokens; None if its config names none."""
    return context_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def missing_figures(experiment: Experiment, judged: bool) -> list[str]:
    """Return a line for each figure that cannot be computed from the experiment's data.

    Args:
        experiment: The validated experiment.
        judged: Whether the stage rm trained a reward model.
    """
    lines = []
    if not judged:
        line = "there is no reward model, so nothing is scored"
        if has_rankings(experiment):
            line += "; to get scores, add best_of_n to evaluate.policies, which trains one"
        lines.append(line)
    if experiment.data.documents is None:
        lines.append("data.documents is not set, so there is no perplexity of pretraining text")
    return lines


def climbed_by_ppo(experiment: Experiment) -> Climbed:
    """Return the reward models that PPO was trained to please, or that chose what it published."""
    settings, others = experiment.ppo, climbed_folders(experiment)
    if settings.held_out_reward_model is not None and settings.keep == "best":
        others.append(Path(settings.held_out_reward_model))
    labels = experiment.rankings.scorer or [] if ranks_by_scorers(experiment) else []
    selector = experiment.evaluate.best_of_by
    return Climbed(own=climbs_own_model(experiment), others=others, selector=selector, labels=labels)
