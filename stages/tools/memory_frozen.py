"""Compute the memory of models that do not train: in rankings, evaluate, chat and servers."""

from collections.abc import Callable, Iterator
from typing import Any

from stages.evaluation.greedy import greedy_length, greedy_prompts
from stages.evaluation.tools import most_sampled
from stages.rollouts.frozen import CHECKED_AT_A_TIME
from stages.settings.checks import context_of
from stages.settings.policies import compared_policies, needs_reward_model, trained_policies
from stages.settings.scorers.model import ModelScorer
from stages.tools.memory_need import Need, is_sharded, processes, sharers
from stages.tools.memory_step import WIDTH, Lengths, Step

CONVERSATION = 8192
"""The tokens of a conversation in chat and playground that is reckoned with, as far as the model's
context allows."""
UNBOUNDED = 10**9
"""The context of a model whose configuration names none."""
LOGITS = 20
"""Bytes of a logit while a token is drawn: it, its log-probability, its probability, copies."""


def of_rankings(experiment: Any, config: Any, passes: Callable, dtype: str) -> Need:
    """Return what the stage rankings needs: it samples from SFT.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        passes: Passes micro-batches through frozen models, as `take_passes`.
        dtype: "float32", "bfloat16" or "float16".
    """
    c, shares = experiment.rankings, sharers(experiment)
    # another engine's samples are checked a few at a time; what the policy samples is more
    few = Step("policy", "logprobs", [(c.max_length - c.response_length, [c.response_length])] * CHECKED_AT_A_TIME)
    models, activations = passes([few])
    rows = -(-c.batch_size // processes(experiment)) * c.samples_per_prompt
    copy = is_sharded(experiment) * models["policy"]  # gathered whole
    sampling = sampled_by_policy(c) * (cache_of(config, rows, c.max_length, dtype) + copy)
    checks = activations * (not samples_itself(c))
    return Need("rankings", models["policy"] // shares, moments=0, kept=0, step=checks, sampling=sampling)


def of_evaluate(experiment: Any, config: Any, passes: Callable, dtype: str, second: Any = None) -> Need:
    """Return what the stage evaluate needs: one model at a time, so the larger of two needs.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        passes: Passes micro-batches through frozen models, as `take_passes`.
        dtype: "float32", "bfloat16" or "float16".
        second: The configuration of the reward models; None: the same one.
    """
    of_policy = answering(experiment, config, passes, dtype)
    of_judge = judging(experiment, config if second is None else second, passes)
    return max(of_policy, of_judge, key=lambda need: need.most)


def answering(experiment: Any, config: Any, passes: Callable, dtype: str) -> Need:
    """Return what evaluate needs while a policy samples, or it or the reference reads text.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        passes: Passes micro-batches through frozen models, as `take_passes`.
        dtype: "float32", "bfloat16" or "float16".
    """
    c = experiment.evaluate
    steps = [Step("policy", "logprobs", longest_pass(c))]
    if experiment.data.documents is not None:
        steps.append(Step("policy", "text", rows=c.batch_size, width=c.perplexity_length))
    models, activations = passes(steps)
    copy = is_sharded(experiment) * models["policy"]  # gathered whole
    sampling = sampled_by_policy(c) * (most_cached(experiment, config, dtype) + copy)
    weights = models["policy"] // sharers(experiment)
    return Need("evaluate", weights, moments=0, kept=0, step=activations, sampling=sampling)


def judging(experiment: Any, config: Any, passes: Callable) -> Need:
    """Return what evaluate needs while reward models score, those of an ensemble together.

    A model that the settings name is taken to be as large as that of rm. It is whole on each
    process, and one that chooses the best of n samples is there beside the others.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the reward models.
        passes: Passes micro-batches through frozen models, as `take_passes`.
    """
    c = experiment.evaluate
    own = experiment.rm.ensemble * needs_reward_model(experiment)
    named = [models_of(judge) for judge in c.judges or []]
    selector = models_of(c.best_of_by)
    if not any([own, *named, selector]):
        return Need("evaluate", weights=0, moments=0, kept=0, step=0)
    scores = Step("reward_model", "scores", [(c.max_length - c.response_length, [c.response_length])] * c.batch_size)
    models, activations = passes([scores], config)
    one, shares = models["reward_model"], sharers(experiment)
    weights = max(own * one // shares + selector * one, one * max(named, default=0))
    return Need("evaluate", weights, moments=0, kept=0, step=activations)


def models_of(scorer: Any) -> int:
    """Return how many reward models of other folders a scorer of the settings holds."""
    return max(1, len(scorer.folders())) if isinstance(scorer, ModelScorer) else 0


def longest_pass(c: Any) -> Lengths:
    """Return the rows of evaluate's largest pass that computes log-probabilities.

    Args:
        c: The section evaluate.
    """
    samples = c.samples_per_prompt
    rows = min(c.batch_size, max(1, c.batch_size // min(samples, 4)) * samples)
    prompt, each = c.max_length - c.response_length, min(samples, rows)
    lengths = [(prompt, [c.response_length] * each)] * (rows // each)
    return lengths + [(prompt, [c.response_length] * (rows % each))] * (rows % each > 0)


def most_cached(experiment: Any, config: Any, dtype: str) -> int:
    """Return the bytes of evaluate's largest cache, over samples and greedy answers.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        dtype: "float32", "bfloat16" or "float16".
    """
    c = experiment.evaluate
    counts = {c.samples_per_prompt, c.best_of if "best_of_n" in compared_policies(experiment) else 1}
    rows = [min(max(1, c.batch_size // min(n, 4)) * n, most_sampled(c, several=n > 1)) for n in counts]
    prompt = c.max_length - c.response_length
    greedy = min(prompt + greedy_length(c), context_of(config.to_dict()) or UNBOUNDED)
    return max(
        cache_of(config, max(rows), c.max_length, dtype),
        cache_of(config, min(greedy_prompts(c), c.batch_size), greedy, dtype),
    )


# -- commands ------------------------------------------------------------------------------------


def of_commands(
    experiment: Any, config: Any, passes: Callable, dtype: str, device: str, second: Any = None
) -> Iterator[Need]:
    """Yield what chat, playground and serve-reward need, each one process that holds whole models.

    Chat is taken to be with two policies, and playground without names with all but base. Their
    policies may be in vLLM, whose memory is not counted. A reward model that the stages divide
    among processes is not loaded for the answers.

    Args:
        experiment: The validated experiment.
        config: transformers' configuration of the model.
        passes: Passes micro-batches through whole frozen models, as `take_passes`.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "mps".
        second: The configuration of the reward models; None: the same one.
    """
    second = config if second is None else second
    policies = [name for name in trained_policies(experiment) if name != "base"]
    policy = passes([Step("policy", "logprobs", [(8, [1])])])[0]["policy"]
    room = min(CONVERSATION, context_of(config.to_dict()) or CONVERSATION)
    cache, judge, scoring = cache_of(config, 1, room, dtype), 0, 0
    if needs_reward_model(experiment):
        models, scoring = passes([Step("reward_model", "scores", [(room - 1, [1])])], second)
        judge = experiment.rm.ensemble * models["reward_model"]
    beside, answering = (0, 0) if is_sharded(experiment) else (judge, scoring)

    here = samples_itself(experiment.evaluate)
    held = here * min(2, len(policies)) * policy
    yield Need("chat", held + beside, moments=0, kept=0, step=answering, sampling=here * cache)

    section = experiment.playground
    here = (section.engine or engine_of(experiment.evaluate)) == "transformers"
    count = here * len(policies if section.policies is None else section.policies)
    places = experiment.launch.processes if device == "cuda" else 1  # policies go onto the GPUs in turn
    if section.reward_model is None:
        beside = answering = 0
    held = max(-(-count // places) * policy, count // places * policy + beside)
    sampling = -(-count // places) * cache
    yield Need("playground", held, moments=0, kept=0, step=answering, sampling=sampling)

    if judge:
        c = experiment.ppo
        rows = [(c.max_length - c.response_length, [c.response_length])] * c.per_device_train_batch_size
        step = passes([Step("reward_model", "scores", rows)], second)[1]
        yield Need("serve-reward", judge, moments=0, kept=0, step=step)


# -- sampling ------------------------------------------------------------------------------------


def engine_of(section: Any) -> str:
    """Return the engine that samples for a section."""
    return "transformers" if section.rollout is None else section.rollout.engine


def sampled_by_policy(section: Any) -> bool:
    """Return whether the policy itself may sample, so that memory is needed for that."""
    return samples_itself(section) or section.rollout.on_failure == "transformers"


def samples_itself(section: Any) -> bool:
    """Return whether the policy itself samples."""
    return engine_of(section) == "transformers"


def cache_of(config: Any, rows: int, length: int, dtype: str) -> int:
    """Return the bytes of the cache of rows of a length, with the logits of a step."""
    return rows * (length * cache_of_token(config) * WIDTH[dtype] + LOGITS * config.get_text_config().vocab_size)


def cache_of_token(config: Any) -> int:
    """Return how many numbers a token adds to the cache: keys and values of all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width
