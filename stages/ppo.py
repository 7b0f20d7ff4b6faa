"""ppo: prompts, a reward model and pretraining text → a better policy, by PPO-ptx (InstructGPT, eq. 2).

    maximise  E[ r(x, y) − β log( π(y|x) / π_SFT(y|x) ) ]  +  γ E[ log π(x_pretrain) ]      β = kl_coef, γ = ptx_coef

Read `run`: one iteration is the numbered list 1 … 7.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.encode import decode_response, encode_prompts, fit_lengths, wrap_documents
from data.groups import Rows, make_rows
from data.records import DataError, prompt_key
from data.streams import Stream, derive_seed, held_out
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.common import adapter_settings, card, check_context, device_of, dtype_of, read, read_placed
from stages.engine import (
    Best,
    Trainee,
    finite_norm,
    gradient_norm,
    learning_rate_at,
    load_checkpoint,
    make_accelerator,
    make_trainee,
    micro_batches,
    optimizer_step,
    pause_if_asked,
    save_checkpoint,
)
from stages.models.adapters import adapter_off, is_adapted, merged, with_adapter
from stages.models.forward import response_logprobs, response_scores, response_values, set_mode
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer, same_tokenizer, save_model
from stages.objectives.advantages import gae
from stages.objectives.losses import language_model_loss, policy_loss, value_loss
from stages.objectives.masked import masked_mean, masked_whiten
from stages.objectives.rewards import final_scores, kl_per_token, token_rewards
from stages.rollouts.rollout import Rollout
from stages.rollouts.transformers import sample
from stages.settings import Schedule, Section, TooLong, no_room, over_context, setting, too_long_prompt

NAME = "ppo"
METRICS = {
    "objective/kl": "KL(policy ‖ SFT) of the sampled responses, in nats a response (k1)",
    "objective/kl_k3": "the same by the k3 estimator",
    "objective/entropy": "the policy's entropy, in nats a token",
    "objective/scores": "mean score of the reward model (demonstrations score 0)",
    "objective/rlhf_reward": "scores − kl_coef · KL (by kl_estimator): what is maximised",
    "objective/length": "tokens a response, EOS included",
    "objective/eos_rate": "share of responses that end with EOS",
    "policy/approxkl_avg": "½ (log ratio)² a token between the policy before and during the update",
    "policy/clipfrac_avg": "share of tokens whose ratio was clipped",
    "loss/policy_avg": "clipped surrogate loss",
    "loss/value_avg": "clipped value loss",
    "loss/ptx": "cross-entropy a pretraining token, in nats, before ptx_coef",
    "val/clipfrac_avg": "share of tokens whose value was clipped",
    "val/ratio": "mean ratio of new to old probability over the update (1 at its first minibatch)",
    "val/explained_variance": "share of the returns' variance that the values foretold",
    "grad_norm/ppo": "norm of the policy gradient before ptx is added and before clipping",
    "grad_norm/ptx": "norm of ptx_coef times the pretraining gradient",
    "grad_norm/value": "norm of the value model's gradient before clipping",
    "kl_coef": "β of this update",
    "eps": "episodes a second, sampling and update together",
    "lr": "the policy's learning rate",
    "episode": "episodes so far",
}
HEADLINE = ("score", "kl", "score_before")
HELD_OUT = {"score": "scores", "kl": "kl", "rlhf_reward": "rlhf_reward", "length": "length", "eos_rate": "eos_rate",
            "entropy": "entropy"}  # fmt: skip


class Config(Section):
    """PPO-ptx. batch_size and mini_batch_size count episodes; an update is one batch."""

    total_episodes: int = setting(256_000, "episodes in all (the paper's)", "episodes", ge=1)
    batch_size: int = setting(512, "episodes of one update", "episodes", ge=2)
    mini_batch_size: int = setting(64, "episodes of one optimizer step", "episodes", ge=1)
    per_device_train_batch_size: int = setting(
        16, "episodes in one forward and backward; changes memory, not the gradient", "episodes", ge=1
    )
    num_ppo_epochs: int = setting(1, "passes over each batch", "epochs", ge=1)
    samples_per_prompt: int = setting(1, "responses to each prompt; batch_size is divided by it", ge=1)
    response_length: int = setting(128, "longest response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "longest prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = too_long_prompt()
    temperature: float = setting(1.0, "divides the logits in sampling, reference and update alike", gt=0)
    learning_rate: float = setting(9.65e-6, "the policy's, after the warm-up", "per step", gt=0)
    value_learning_rate: float = setting(9e-6, "the value model's (the paper's)", "per step", gt=0)
    warmup_steps: int = setting(10, "updates of linear warm-up from a tenth", "updates", ge=0)
    lr_scheduler_type: Schedule = setting("constant", "shape of both learning rates after the warm-up")
    max_grad_norm: float = setting(
        1.0, "clips the policy's summed gradient (PPO + ptx) and the value model's, each apart", gt=0
    )
    kl_coef: float = setting(0.02, "β, the penalty on KL to the SFT policy", "reward per nat", ge=0)
    kl_estimator: Literal["k1", "k3"] = setting("k1", "how the penalty estimates KL at a token")
    cliprange: float = setting(0.2, "ratio clip ε", gt=0)
    cliprange_value: float = setting(0.2, "value clip", "reward", gt=0)
    lam: float = setting(0.95, "λ of generalised advantage estimation (γ is 1)", ge=0, le=1)
    ptx_coef: float = setting(27.8, "γ, weight of the pretraining loss (mean a token); 0 is plain PPO", ge=0)
    ptx_ratio: float = setting(8.0, "pretraining rows an episode", "rows", gt=0)
    ptx_length: int = setting(128, "length of a packed pretraining row", "tokens", ge=8)
    missing_eos_score: float | None = setting(-1.0, "score of a response without EOS; null: its own", "reward")
    whiten_rewards: bool = setting(False, "divide rewards by their standard deviation over the batch")
    whiten_advantages: bool = setting(True, "whiten advantages over the batch")
    eval_steps: int = setting(20, "held-out prompts every so many updates", "updates", ge=1)
    eval_prompts: int = setting(64, "how many prompts are held out for that", "prompts", ge=1)
    keep: Literal["best", "last"] = setting(
        "last", "publish the last policy, or the best by held-out score − kl_coef · kl (value_model/ is the last one)"
    )
    patience: int | None = setting(None, "stop after so many held-out looks without a better one", "looks", ge=1)
    reward_model: str | None = setting(None, "folder of another reward model in place of rm's")


def needs(experiment) -> list[str]:
    return ["sft", "rm"]


def reads(experiment) -> list[str]:
    return ["prompts"] + (["documents"] if experiment.ppo.ptx_coef else [])


def folders(experiment) -> dict:
    folder = experiment.ppo.reward_model
    return {} if folder is None else {"ppo.reward_model": Path(folder).expanduser()}


def check(experiment) -> list[str]:
    c, wrong = experiment.ppo, []
    if c.batch_size % c.mini_batch_size:
        wrong.append(f"ppo.mini_batch_size: {c.mini_batch_size} does not divide batch_size {c.batch_size}; choose one")
    if c.batch_size % c.samples_per_prompt:
        wrong.append(
            f"ppo.samples_per_prompt: {c.samples_per_prompt} does not divide batch_size {c.batch_size}; choose one"
        )
    wrong += no_room(experiment, "ppo") + over_context(experiment, "ppo", *["ptx_length"] * bool(c.ptx_coef))
    if c.ptx_coef and round(c.ptx_ratio * c.mini_batch_size) < 1:
        wrong.append(
            f"ppo.ptx_ratio: {c.ptx_ratio} times mini_batch_size {c.mini_batch_size} is no row at all; raise it, or "
            f"set ptx_coef: 0"
        )
    if c.total_episodes % c.batch_size:
        wrong.append(
            f"ppo.total_episodes: {c.total_episodes} is no multiple of batch_size {c.batch_size}; "
            f"{c.total_episodes // c.batch_size * c.batch_size or c.batch_size} is one"
        )
    if c.reward_model is not None and not (Path(c.reward_model).expanduser() / "config.json").is_file():
        wrong.append(
            f"ppo.reward_model: {c.reward_model} holds no config.json; give the model/ folder of a reward model"
        )
    return wrong


@dataclass(frozen=True)
class Roles:
    """The four models, what they share, and where they compute."""

    policy: torch.nn.Module
    ref_policy: torch.nn.Module | None  # None: the policy with its adapter off
    reward_model: torch.nn.Module
    value_model: torch.nn.Module
    tokenizer: object
    accelerator: object


def run(ctx: StageRun) -> dict:
    """→ model/ (policy) and value_model/."""
    c = ctx.config
    roles = load_roles(ctx)
    train, held = load_prompts(ctx, roles.tokenizer)
    ptx_rows = load_ptx(ctx, roles.tokenizer)
    updates, per_batch = c.total_episodes // c.batch_size, c.batch_size // c.samples_per_prompt
    ctx.tracker.say(
        f"ppo: {len(train)} prompts, {len(held)} held out; {updates} updates of {c.batch_size} episodes, "
        f"{c.batch_size // c.mini_batch_size * c.num_ppo_epochs} optimizer steps each"
    )
    policy = make_trainee("policy", roles.policy, learning_rate=c.learning_rate, max_grad_norm=c.max_grad_norm)
    value = make_trainee(
        "value_model", roles.value_model, learning_rate=c.value_learning_rate, max_grad_norm=c.max_grad_norm
    )
    best = Best(c.keep, c.patience, higher_is_better=True)
    step, state = load_checkpoint(ctx, [policy, value], best, updates)
    prompts = Stream(len(train), derive_seed(ctx.seed, "prompts"), cursor=step * per_batch)
    per_update = round(c.ptx_ratio * c.mini_batch_size) * (c.batch_size // c.mini_batch_size) * c.num_ppo_epochs
    ptx = Stream(len(ptx_rows), derive_seed(ctx.seed, "ptx"), cursor=step * per_update) if ptx_rows else None
    if step == 0:
        preflight(ctx, roles, train[: 2 * c.per_device_train_batch_size])
        state = {"looks": {"0": look(ctx, roles, held, 0, policy, best)}}
    looks = state["looks"]  # step → held-out figures
    save = lambda at: save_checkpoint(ctx, at, updates, [policy, value], best, {"looks": looks})  # noqa: E731

    with ctx.tracker.progress(updates, "ppo", step) as progress:
        while step < updates and not best.exhausted:
            step, began = step + 1, time.perf_counter()
            # 1 prompts
            drawn = prompts.take(per_batch)
            # 2 sample, and what every model says of the samples
            rollout = collect(ctx, roles, [train[i] for i in drawn], drawn, step)
            mask = rollout.rows.response_mask
            # 3 reward: the score at the last token, minus kl_coef · KL at each
            kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, c.kl_estimator)
            rewards = token_rewards(rollout.scores, kl, mask, c.kl_coef)
            if c.whiten_rewards:
                rewards = masked_whiten(rewards, mask, shift_mean=False)
            # 4 advantage
            advantages, returns = gae(rewards, rollout.values, mask, c.lam)
            if c.whiten_advantages:
                advantages = masked_whiten(advantages, mask)
            # 5 update
            rate, value_rate = (
                learning_rate_at(step, updates, peak, c.lr_scheduler_type, c.warmup_steps, warmup_from=0.1)
                for peak in (c.learning_rate, c.value_learning_rate)
            )
            learned = update(
                ctx,
                roles,
                policy,
                value,
                rollout,
                advantages,
                returns,
                step,
                rate,
                value_rate,
                lambda n: [ptx_rows[i] for i in ptx.take(n)] if ptx else None,
            )
            # 6 keep
            row = {
                **describe(rollout, returns, c.kl_coef, c.kl_estimator),
                **learned,
                "kl_coef": c.kl_coef,
                "eps": c.batch_size / (time.perf_counter() - began),
                "lr": rate,
                "episode": step * c.batch_size,
            }
            ctx.tracker.log(step, row)
            progress.update(step, score=row["objective/scores"], kl=row["objective/kl"])
            if step % c.eval_steps == 0 or step == updates:
                looks[str(step)] = look(ctx, roles, held, step, policy, best)
            if ctx.checkpoints.due(step) and step < updates:
                save(step)
            if step < updates:
                pause_if_asked(ctx, step, updates, lambda at=step: save(at))

    # 7 publish
    if str(step) not in looks:  # settings that were overridden ended the run at its checkpoint
        looks[str(step)] = look(ctx, roles, held, step, policy, best)
    if c.keep == "best" and best.step != step:
        policy.load(best.tensors)
    before, after = looks["0"], looks[str(best.step if c.keep == "best" else step)]
    save_model(
        merged(roles.policy), roles.tokenizer, ctx.publish / "model", card=card(ctx, "a policy trained by PPO-ptx")
    )
    save_model(merged(roles.value_model), roles.tokenizer, ctx.publish / "value_model", card=card(ctx, "a value model"))
    return {**after, **{f"{k}_before": v for k, v in before.items()}, "updates": step, "best_step": best.step}


def load_roles(ctx: StageRun) -> Roles:
    """Policy and reference from sft; reward model from rm; value model initialised from the reward model."""
    m, c = ctx.experiment.model, ctx.config
    accelerator = make_accelerator(device_of(ctx), dtype_of(ctx.experiment))
    options = {"attn_implementation": m.attn_implementation, "trust_remote_code": ctx.trust_remote_code}
    sft = ctx.inputs["sft"] / "model"
    check_context(ctx, sft)
    rm = Path(c.reward_model).expanduser() if c.reward_model else ctx.inputs["rm"] / "model"
    tokenizer = load_tokenizer(sft, trust_remote_code=ctx.trust_remote_code)
    try:
        same_tokenizer(tokenizer, load_tokenizer(rm, trust_remote_code=ctx.trust_remote_code), str(rm))
        reward_model = load_scalar_model(rm, **options).requires_grad_(False)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if c.reward_model is None or isinstance(error, UserError):
            raise
        what = f"{rm} cannot be loaded ({str(error).splitlines()[0].rstrip(': ')})"
        raise UserError(f"ppo.reward_model: {what}; give the model/ folder of a reward model") from error
    adapter = adapter_settings(m) or {"method": None}
    policy = with_adapter(load_policy(sft, **options), **adapter, seed=derive_seed(ctx.seed, "policy"))
    value_model = with_adapter(
        load_scalar_model(rm, **options), **adapter, scalar=True, seed=derive_seed(ctx.seed, "value")
    )
    ref_policy = None if is_adapted(policy) else load_policy(sft, **options).requires_grad_(False)
    if m.gradient_checkpointing:
        policy.activation_checkpointing_enable()
        value_model.activation_checkpointing_enable()
    for model in filter(None, (policy, ref_policy, reward_model, value_model)):
        model.to(accelerator.device)
    return Roles(policy, ref_policy, reward_model, value_model, tokenizer, accelerator)


def load_prompts(ctx: StageRun, tokenizer) -> tuple[list[list[int]], list[tuple]]:
    """Prompt ids for training and, split off by the prompt's text, (prompt, its ids) for the held-out figures."""
    c = ctx.config
    records, places = read_placed(ctx, "prompts")
    if len(records) < 2:
        raise DataError([f"data.prompts: {len(records)} prompt; PPO needs at least 2, one of them to hold out"])
    ids = encode_prompts(tokenizer, (r.prompt for r in records), places)
    kept, ids, _, report = fit_lengths(
        ids,
        [[] for _ in ids],
        max_length=c.max_length - c.response_length,
        on_too_long="drop" if c.on_too_long == "truncate" else c.on_too_long,
        what="prompt",
        names=places,
        section="ppo",
    )
    ctx.tracker.say(f"ppo: {report.line('prompts')}")
    train, held = held_out(
        [prompt_key(records[i].prompt) for i in kept], 0.0, least=max(1, min(c.eval_prompts, len(ids) // 5))
    )
    if not held:
        raise DataError(
            [
                f"data.prompts: one prompt is left within {c.max_length - c.response_length} tokens; PPO needs at "
                f"least 2, one of them to hold out"
            ]
        )
    return [ids[i] for i in train], [(records[kept[i]].prompt, ids[i]) for i in held]


def load_ptx(ctx: StageRun, tokenizer) -> list[list[int]] | None:
    """Packed pretraining rows from the training part of the documents; None for plain PPO."""
    c = ctx.config
    if not c.ptx_coef:
        return None
    documents = read(ctx, "documents")
    train, _ = held_out([d.text for d in documents], ctx.experiment.data.validation_fraction)
    rows = wrap_documents(tokenizer, (documents[i] for i in train), length=c.ptx_length)
    if not rows:
        raise DataError(
            [
                f"data.documents: fewer than ppo.ptx_length = {c.ptx_length} tokens of pretraining text; "
                f"lower it, give more text, or set ppo.ptx_coef: 0"
            ]
        )
    return rows


def collect(
    ctx: StageRun, roles: Roles, prompts, prompt_ids, step: int, stream: str = "rollout", n: int | None = None
) -> Rollout:
    """n responses a prompt and what every model says of them. Randomness: (run, stream, update, prompt, sample)."""
    c, tokenizer = ctx.config, roles.tokenizer
    n = n or c.samples_per_prompt
    repeated = [p for p in prompts for _ in range(n)]
    seeds, seen = [], Counter()  # a prompt may be drawn twice: its samples are numbered on
    for i in prompt_ids:
        seeds += [derive_seed(ctx.seed, stream, step, i, seen[i] + k) for k in range(n)]
        seen[i] += n
    with roles.accelerator.autocast():
        responses = sample(
            roles.policy,
            repeated,
            seeds,
            response_length=c.response_length,
            temperature=c.temperature,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
    rows = make_rows(repeated, responses, tokenizer.pad_token_id).to(roles.accelerator.device)
    finished = torch.tensor([r[-1] == tokenizer.eos_token_id for r in responses], device=roles.accelerator.device)
    order, parts = by_length(rows, range(len(responses))), []
    with torch.no_grad(), roles.accelerator.autocast():
        for index in micro_batches(order, min(c.per_device_train_batch_size, c.mini_batch_size)):
            part = rows.select(torch.tensor(index, device=roles.accelerator.device))
            logprobs, entropy = response_logprobs(roles.policy, part, c.temperature, with_entropy=True)
            parts.append(
                (
                    logprobs,
                    reference_logprobs(roles, part, c.temperature),
                    response_values(roles.value_model, part),
                    entropy,
                    response_scores(roles.reward_model, part),
                )
            )
    back = torch.tensor(order, device=roles.accelerator.device).argsort()
    logprobs, ref_logprobs, values, entropy, scores = (torch.cat(x)[back] for x in zip(*parts, strict=True))
    return Rollout(
        rows, logprobs, ref_logprobs, values, entropy, final_scores(scores, finished, c.missing_eos_score), finished
    )


def by_length(rows: Rows, index) -> list[int]:
    """`index` with like lengths together, so that micro-batches carry little padding."""
    length = (rows.prompt_lengths + rows.lengths).tolist()
    return sorted(index, key=lambda i: length[i])


def reference_logprobs(roles: Roles, rows, temperature: float) -> Tensor:
    with adapter_off(roles.policy) if roles.ref_policy is None else nullcontext(roles.ref_policy) as reference:
        return response_logprobs(reference, rows, temperature)


def preflight(ctx: StageRun, roles: Roles, prompts) -> None:
    """At the start KL to the reference is 0, and the update repeats the rollout's numbers (ratio 1); or refuse."""
    c = ctx.config
    rollout = collect(ctx, roles, prompts, range(len(prompts)), 0, "preflight", 1)
    mask = rollout.rows.response_mask
    again = torch.zeros_like(rollout.logprobs)  # as the update does it: other rows together, and with gradients
    with roles.accelerator.autocast():
        for mini in micro_batches(list(reversed(range(len(mask)))), c.mini_batch_size):
            for index in micro_batches(by_length(rollout.rows, mini), c.per_device_train_batch_size):
                at = torch.tensor(index, device=mask.device)
                again[at] = response_logprobs(roles.policy, rollout.rows.select(at), c.temperature).detach()
    limit = 1e-4 if dtype_of(ctx.experiment) == "float32" else 2e-2
    kl = masked_mean((rollout.logprobs - rollout.ref_logprobs).abs(), mask).item()
    drift = masked_mean(((again - rollout.logprobs).exp() - 1).abs(), mask).item()
    if not kl <= limit:
        raise UserError(
            f"ppo preflight: KL to the reference is {kl:.2g} nats a token before the first update, 0 is right: "
            f"policy and reference are not the same model; make sft anew (--force) and run again"
        )
    if not drift <= limit:
        raise UserError(
            f"ppo preflight: the ratio at the first minibatch would be off by {drift:.2g} a token (limit {limit:g}): "
            f"the forward is not repeatable; use model.attn_implementation: eager or model.dtype: float32"
        )


def update(
    ctx: StageRun,
    roles: Roles,
    policy: Trainee,
    value: Trainee,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    step: int,
    rate: float,
    value_rate: float,
    ptx_batch: Callable[[int], list[list[int]] | None],
) -> dict[str, float]:
    """All inner epochs over a batch: per minibatch one policy step (PPO gradient + ptx_coef · ptx gradient, the sum
    clipped) and one value step. → metrics averaged over the optimizer steps."""
    c = ctx.config
    totals: dict[str, float] = {}
    steps = 0
    for epoch in range(c.num_ppo_epochs):
        order = torch.randperm(
            c.batch_size, generator=torch.Generator().manual_seed(derive_seed(ctx.seed, "minibatches", step, epoch))
        ).tolist()
        for mini in micro_batches(order, c.mini_batch_size):
            figures = ppo_gradients(ctx, roles, rollout, advantages, returns, mini)
            figures["grad_norm/ppo"] = gradient_norm(policy.parameters.values())
            rows = ptx_batch(round(c.ptx_ratio * c.mini_batch_size))
            if rows is not None:
                figures |= ptx_gradient(ctx, roles, policy, rows)
            finite_norm(value, step)  # neither steps if one cannot
            optimizer_step(policy, rate, step)
            figures["grad_norm/value"] = optimizer_step(value, value_rate, step)
            steps += 1
            for key, number in figures.items():
                totals[key] = totals.get(key, 0.0) + number
    return {key: number / steps for key, number in totals.items()}


def ppo_gradients(
    ctx: StageRun, roles: Roles, rollout: Rollout, advantages, returns, mini: list[int]
) -> dict[str, float]:
    """Accumulate the gradients of policy and value loss over one minibatch: sums over its tokens, over their count."""
    c, device = ctx.config, roles.accelerator.device
    tokens = rollout.rows.lengths[torch.tensor(mini, device=device)].sum().item()
    figures: dict[str, float] = {}
    for index in micro_batches(by_length(rollout.rows, mini), c.per_device_train_batch_size):
        at = torch.tensor(index, device=device)
        rows = rollout.rows.select(at)
        mask = rows.response_mask
        with roles.accelerator.autocast():
            logprobs = response_logprobs(roles.policy, rows, c.temperature)
        loss, sums = policy_loss(logprobs, rollout.logprobs[at], advantages[at], mask, c.cliprange, tokens)
        roles.accelerator.backward(loss)
        with roles.accelerator.autocast():
            values = response_values(roles.value_model, rows)
        v_loss, v_sums = value_loss(values, rollout.values[at], returns[at], mask, c.cliprange_value, tokens)
        roles.accelerator.backward(v_loss)
        for key, number in (
            ("loss/policy_avg", loss),
            ("loss/value_avg", v_loss),
            ("val/ratio", sums["ratio"] / tokens),
            ("policy/clipfrac_avg", sums["clipped"] / tokens),
            ("policy/approxkl_avg", sums["approxkl"] / tokens),
            ("val/clipfrac_avg", v_sums["clipped"] / tokens),
        ):
            figures[key] = figures.get(key, 0.0) + number.item()
    return figures


def ptx_gradient(ctx: StageRun, roles: Roles, policy: Trainee, rows: list[list[int]]) -> dict[str, float]:
    """Add ptx_coef times the gradient of the mean cross-entropy a token over `rows` to the policy's gradients.

    A backward of its own, so that both norms are known before they are summed.
    """
    c = ctx.config
    held = [p.grad for p in policy.parameters.values()]
    for p in policy.parameters.values():
        p.grad = None
    tokens, total = len(rows) * (len(rows[0]) - 1), 0.0
    for part in micro_batches(rows, c.per_device_train_batch_size):
        ids = torch.tensor(part, device=roles.accelerator.device)
        set_mode(roles.policy)
        with roles.accelerator.autocast():
            logits = roles.policy(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = language_model_loss(logits, ids[:, 1:], tokens)
        total += loss.item()
        roles.accelerator.backward(c.ptx_coef * loss)
    norm = gradient_norm(policy.parameters.values())
    for p, grad in zip(policy.parameters.values(), held, strict=True):
        p.grad = grad if p.grad is None else p.grad if grad is None else p.grad + grad
    return {"loss/ptx": total, "grad_norm/ptx": norm}


def describe(rollout: Rollout, returns: Tensor, kl_coef: float, kl_estimator: str) -> dict[str, float]:
    """The figures of a rollout, under their usual names."""
    mask = rollout.rows.response_mask
    kl = torch.where(mask, kl_per_token(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(-1).mean().item()
    k3 = torch.where(mask, kl_per_token(rollout.logprobs, rollout.ref_logprobs, "k3"), 0.0).sum(-1).mean().item()
    error = masked_mean((returns - rollout.values - masked_mean(returns - rollout.values, mask)) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    scores = rollout.scores.mean().item()
    return {
        "objective/kl": kl,
        "objective/kl_k3": k3,
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "objective/scores": scores,
        "objective/rlhf_reward": scores - kl_coef * (k3 if kl_estimator == "k3" else kl),
        "objective/length": mask.sum(-1).float().mean().item(),
        "objective/eos_rate": rollout.finished.float().mean().item(),
        "val/explained_variance": (1 - error / spread.clamp(min=1e-12)).item(),
    }


def look(ctx: StageRun, roles: Roles, held, step: int, policy: Trainee, best: Best) -> dict[str, float]:
    """Held-out prompts, one sample each, the same seeds every time; the two best and worst are kept as text."""
    rollout = collect(ctx, roles, [ids for _, ids in held], range(len(held)), 0, "held-out", 1)
    figures = describe(rollout, rollout.values, ctx.config.kl_coef, ctx.config.kl_estimator)
    figures = {name: figures[f"objective/{key}"] for name, key in HELD_OUT.items()}
    ctx.tracker.evaluation(step, figures)
    best.offer(figures["rlhf_reward"], step, policy)
    mask = rollout.rows.response_mask
    kl = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(-1).tolist()
    order = rollout.scores.argsort().tolist()
    rows = [
        {"prompt": held[i][0],
         "response": decode_response(roles.tokenizer, rollout.rows.responses[i][mask[i]].tolist()),
         "score": rollout.scores[i].item(), "kl": kl[i]}
        for i in dict.fromkeys([*order[-2:], *order[:2]])
    ]  # fmt: skip
    ctx.tracker.samples(step, rows)
    return figures
