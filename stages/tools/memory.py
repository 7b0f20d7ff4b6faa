"""Compute the memory that each stage of an experiment with models needs of a device, and commands.

The bytes come from an optimizer step, or from forward passes, on shapes only (`memory_step.py`),
with rows as long as the settings allow, so they are the most that a stage needs. Not counted are
CUDA's context and its libraries' workspaces (about 1 GB), memory lost to fragmentation, and on a
CPU the libraries themselves (about half a GB).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.config.section import Section
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from pipeline.launch import devices
from pipeline.launch.parallel import BUCKET
from stages.models.adapters import AdapterSettings
from stages.models.layout import layout_of
from stages.models.loading import packaged_gguf, scratch_config
from stages.models.remote_code import SCALAR, from_pretrained, is_remote
from stages.models.roles import most_tokens
from stages.settings.peft import model_of
from stages.settings.policies import judge_share, reward_models
from stages.settings.ppo import has_value_model, named_rewards
from stages.settings.reward_base import trains_sft, with_own_base
from stages.settings.scorers.model import ModelScorer
from stages.settings.training import batch_of_each
from stages.shared.runtime import adapter_settings, dtype_of
from stages.tools.memory_axes import held_together, on_axes, on_device, whole_layers
from stages.tools.memory_frozen import cache_of, of_commands, of_evaluate, of_rankings
from stages.tools.memory_need import Need, groups, is_sharded, processes, saves_copies, sharers
from stages.tools.memory_step import Lengths, Sizes, Step, take_passes, take_step
from stages.training.batching import in_micro_batches
from stages.training.text_packing import SMALL_VOCABULARY, has_many_logits


def of_experiment(experiment: Any, device: str, trust_remote_code: bool = False) -> Iterator[Need]:
    """Yield what each stage with models needs, base and rankings only where they have work.

    Chat, playground and serve-reward follow (`of_commands`).

    Args:
        experiment: The validated experiment.
        device: "cpu", "cuda" or "mps".
        trust_remote_code: Whether code that the model brings may run.
    """
    m, dtype = experiment.model, dtype_for(experiment, device)
    config = model_config(m, trust_remote_code)
    seen = with_own_base(experiment)  # the reward model's base; the same experiment without one
    second = config if seen is experiment else model_config(seen.model, trust_remote_code, "rm.base.name_or_path")
    for need in needs_of(experiment, device, config, second):
        if not saves_copies(experiment):
            need = replace(need, saving=0)
        yield offloaded(need, experiment, device)

    def passes(steps: list[Step], config: Any = config) -> tuple[dict[str, int], int]:
        return take_passes(config, steps, dtype, device, m.attn_implementation)

    yield from of_commands(experiment, config, passes, dtype, device, second)


def offloaded(need: Need, experiment: Any, device: str) -> Need:
    """Return what a stage needs if `launch.offload: all` moves what a GPU holds between passes.

    Args:
        need: What the stage needs, without that.
        experiment: The validated experiment.
        device: "cpu" or "cuda"; the CPU offloads to itself.
    """
    if experiment.launch.offload != "all" or device == "cpu":
        return need
    moved = need.weights + need.moments + need.kept
    return replace(need, weights=0, moments=0, kept=0, host=need.host + moved)


def needs_of(experiment: Any, device: str, config: Any, second: Any) -> Iterator[Need]:
    """Yield what each stage needs before `offloaded`.

    Args:
        experiment: The validated experiment.
        device: "cpu", "cuda" or "mps".
        config: transformers' configuration of the policy.
        second: That of the reward model's own base; the same one without.
    """
    m, dtype, ranks = experiment.model, dtype_for(experiment, device), groups(experiment)
    parts, sharded, layout = sharers(experiment), is_sharded(experiment), layout_of(experiment.launch, ranks)

    def take(steps: list[Step], stage: str, config: Any = config) -> Sizes:
        adapter = AdapterSettings() if stage.endswith("base") else adapter_settings(model_of(experiment, stage))
        how = {"checkpointing": m.gradient_checkpointing, "attention": m.attn_implementation, "layout": layout}
        shares = ranks if layout.splits_step else parts
        sizes = take_step(config, steps, adapter, dtype, device, parts=shares, **how)
        sizes = on_axes(sizes, experiment.launch, config, steps, m.attn_implementation, parts)
        alone = processes(experiment) == 1
        return sizes if sharded or alone else replace(sizes, step=max(sizes.step, summed(sizes.trains)))

    for stage, of, config_of_stage in text_stages(experiment, config, second):
        c = getattr(of, stage.removeprefix("rm_"))
        head = "logits" if has_whole_logits(of, stage, c, config_of_stage) else "text"
        rows, times = batch_of_each(c.per_device_train_batch_size, c.gradient_accumulation_steps, ranks)
        step = Step("policy", head, rows=rows, width=c.max_length + 1, times=min(2, times))
        sizes = take([step], stage, config_of_stage)
        trains = sizes.trains["policy"]
        kept = trains * (c.keep == "best") // parts
        if stage == "sft" and c.ppo_init is not None:
            kept += sizes.models["policy"]  # the finished policy, while the one for PPO trains
        buckets = trains * (processes(experiment) > 1 and not sharded)  # DDP's buckets of gradients
        yield replace(need(stage, sizes, kept), step=sizes.step + buckets)

    def passes(steps: list[Step], config: Any = config) -> tuple[dict[str, int], int]:
        models, most = take_passes(config, steps, dtype, device, m.attn_implementation, sharded)
        if parts > 1 and held_together(experiment.launch):
            gathered = whole_layers(config, {step.model for step in steps}, m.attn_implementation)
            most += on_device(gathered, experiment.launch, config, steps) - gathered
        return models, most

    if experiment.data.rankings is None:
        yield of_rankings(experiment, config, passes, dtype)
    for stage, head, model in (("rm", "scores", "reward_model"), ("dpo", "logprobs", "policy")):
        if stage == "dpo":
            yield of_ppo(experiment, config, partial(take, stage="ppo"), dtype, device, second, passes)
        c = getattr(experiment, stage)
        times = -(-c.gradient_accumulation_steps // ranks) if c.per_device_train_tokens is None else 2
        steps = [Step(model, head, ranked(c, experiment), times=min(2, times))]
        sizes = take(steps, stage, second if stage == "rm" else config)
        others = len(reward_models(experiment, has_judge=judge_share(experiment) > 0)) - 1
        copies = (c.keep == "best") + (others if stage == "rm" else 0)
        yield need(stage, sizes, kept=copies * sizes.trains[model] // parts)
    yield of_evaluate(experiment, config, passes, dtype, second)


def has_whole_logits(experiment: Any, stage: str, section: Any, config: Any) -> bool:
    """Return whether a stage that trains on text computes all logits at once (see `make_trainer`).

    Args:
        experiment: The experiment as the stage sees it.
        stage: The stage.
        section: Its settings.
        config: transformers' configuration of its model.
    """
    vocabulary = config.get_text_config().vocab_size
    if held_together(experiment.launch) or getattr(section, "label_smoothing", None):
        return True
    balances, packing = (getattr(section, name, None) for name in ("router_aux_loss_coef", "packing"))
    many = has_many_logits(vocabulary, section.per_device_train_batch_size, section.max_length)
    if many and not balances and packing is not False:  # the head of labels alone (`choose_pass`)
        return False
    return vocabulary <= SMALL_VOCABULARY or adapter_settings(model_of(experiment, stage)).soft_prompt is not None


def summed(trains: dict[str, int]) -> int:
    """Return the bytes of gradients while processes sum them, with a flat copy of some of them.

    Args:
        trains: The bytes of each model's weights that train.
    """
    return sum(trains.values()) + min(max(trains.values()), 4 * BUCKET)


def text_stages(experiment: Any, config: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the stages that train on text: (stage, experiment as it sees it, configuration).

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the policy.
        second: That of the reward model's own base; the same one without.
    """
    if experiment.model.name_or_path is None:
        yield "base", experiment, config
    yield "sft", experiment, config
    if second is config:
        return
    seen = with_own_base(experiment)
    if seen.model.name_or_path is None:
        yield "rm_base", seen, second
    if trains_sft(experiment):
        yield "rm_sft", seen, second


def of_ppo(
    experiment: Any,
    config: Any,
    take: Callable,
    dtype: str,
    device: str,
    second: Any = None,
    passes: Callable | None = None,
) -> Need:
    """Return what the stage ppo needs.

    Policy and value model train. The reference is the policy without its adapter, or a model of its
    own. Weights that do not train exist once. A reward model of another base with as many token ids
    is taken to have the policy's tokenizer: then the value model starts as it.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        take: Takes a step, as `take_step` with all but its steps given.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "mps".
        second: The configuration of the reward model; None: the same one.
        passes: Passes micro-batches through frozen models, as `take_passes`; read with `second`.
    """
    second = config if second is None else second
    c, ranks = experiment.ppo, groups(experiment)
    width = (c.max_length - c.response_length, c.response_length)
    episodes, most = -(-c.mini_batch_size // ranks), most_tokens(config, device)
    parts = in_micro_batches([sum(width)] * episodes, range(episodes), 1, c.per_device_train_batch_size, most)
    of_part = {"lengths": [(width[0], [width[1]])] * max(map(len, parts)), "times": min(2, len(parts))}
    steps = [Step("policy", "logprobs", **of_part)]
    if has_value_model(c):
        steps.append(Step("value_model", "values", **of_part))
    if c.ptx_coef:
        rows = -(-round(c.ptx_ratio * c.mini_batch_size) // ranks)
        some = min(rows, c.per_device_train_batch_size)
        steps.append(Step("policy", "text", rows=some, width=c.ptx_length, times=1 + (rows > some)))
    reads_ids = second.get_text_config().vocab_size == config.get_text_config().vocab_size
    if second is not config and reads_ids and has_value_model(c):
        of_policy = [step for step in steps if step.model == "policy"]
        sizes = side_by_side(take(of_policy), take([step for step in steps if step.model != "policy"], config=second))
    else:
        sizes = take(steps)
    policy = sizes.trains["policy"]
    # without a value model, a reward model is taken to be as large as the policy
    like = "value_model" if has_value_model(c) else "policy"
    value, scalar, whole = sizes.trains[like], sizes.frozen[like], sizes.models[like]
    shares, sharded = sharers(experiment), is_sharded(experiment)
    weights = sum(sizes.models.values()) if sharded else sizes.weights
    weights += scalar * (c.held_out_reward_model is not None)
    if not sizes.adapted:  # the reference is a model of its own, which shares what does not train
        own = sizes.frozen["policy"]
        weights += own if sharded else min(own, policy)
    for _, _, settings in named_rewards(c):
        if not isinstance(settings, ModelScorer):
            continue
        if not settings.is_own():
            weights += scalar * max(1, len(settings.folders()))
        elif passes is not None and second is not config:
            models, _ = passes([Step("reward_model", "scores", of_part["lengths"])], second)
            # one that reads texts is whole on each process
            weights += experiment.rm.ensemble * models["reward_model"] * (1 if reads_ids else shares)
        else:
            weights += experiment.rm.ensemble * (value if sizes.shared else scalar)
            trunk = whole - value
            # of the policy that PPO starts from
            weights += trunk * (sizes.shared and experiment.sft.ppo_init is not None)
    kept = policy * (c.publish_ema + (c.keep == "best"))
    sampled = min(c.local_rollout_forward_batch_size, -(-c.batch_size // processes(experiment)))
    cache = cache_of(config, sampled, sum(width), dtype)
    cast = policy // 2 if dtype != "float32" else 0
    if sharded:  # a whole copy, with its linear layers cast
        cast = sizes.frozen["policy"]
    sizes = replace(sizes, weights=weights // shares)
    own = "transformers" in (c.rollout.engine, c.rollout.on_failure)  # vLLM has memory of its own
    return replace(need("ppo", sizes, kept // shares), sampling=own * (cache + cast))


def side_by_side(one: Sizes, other: Sizes) -> Sizes:
    """Return the sizes of two models that share no weights and step one after the other."""
    return Sizes(
        weights=one.weights + other.weights,
        models=one.models | other.models,
        frozen=one.frozen | other.frozen,
        trains=one.trains | other.trains,
        moments=one.moments + other.moments,
        step=max(one.step, other.step),
        host=one.host + other.host,
        saved=one.saved + other.saved,
        shared=False,
        adapted=one.adapted,
    )


def need(stage: str, sizes: Sizes, kept: int) -> Need:
    """Return what a stage needs, given the bytes of a step and of copies that are kept."""
    return Need(stage, sizes.weights, sizes.moments, kept, sizes.step, host=sizes.host, saving=sizes.saved + kept)


def ranked(c: Section, experiment: Any) -> Lengths:
    """Return the longest micro-batch of rm or dpo; rankings from a file are taken to be pairs."""
    k, response = experiment.rankings.samples_per_prompt, min(experiment.rankings.response_length, c.max_length - 1)
    if experiment.data.rankings is not None:
        k, response = 2, c.max_length - 1
    group = (c.max_length - response, [response] * k)
    if c.per_device_train_tokens is None:
        return [group] * c.per_device_train_batch_size
    return [group] * max(1, c.per_device_train_tokens // (group[0] + sum(group[1])))


def dtype_for(experiment: Any, device: str) -> str:
    """Return the dtype of products; "auto" on a GPU that this machine does not have is bfloat16."""
    if experiment.model.dtype == "auto" and not devices.is_there(device):
        return "bfloat16"
    return dtype_of(experiment)


def model_config(m: Any, trust_remote_code: bool = False, where: str = "model.name_or_path") -> Any:
    """Return transformers' configuration of the model that a section names.

    Args:
        m: The section.
        trust_remote_code: Whether code that the model brings may run.
        where: The setting that names the model, for error lines.
    """
    from transformers import AutoConfig

    if m.name_or_path is None:
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return scratch_config(m.vocab_size, m.max_position_embeddings, **{name: getattr(m, name) for name in shape})
    if m.name_or_path.startswith("package:"):
        path, options = packaged_gguf(m.name_or_path.removeprefix("package:"))
        options = {"gguf_file": options}
    else:
        path = str(local_folder(m.name_or_path) or m.name_or_path)
        options = {} if m.revision is None else {"revision": m.revision}
    try:
        config = from_pretrained(AutoConfig, path, where=where, trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except (OSError, ValueError) as problem:
        raise UserError(f"{where}: {str(problem).splitlines()[0]}") from problem
    if is_remote(config) and SCALAR not in config.auto_map:
        remedy = "base writes one: run it, then name its artifact's model/ here"
        raise UserError(f"{where}: {m.name_or_path} brings no sequence classification; {remedy}")
    return config
