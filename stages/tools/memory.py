"""doctor --memory: the bytes that each training stage asks of a device, found by taking its step without any data.

torch's FakeTensorMode runs the real models, heads, adapters and optimizers on shapes alone, in seconds and at no
memory; `Live` counts what is alive. Rows are as long as the settings allow, so this is the most that a stage asks for.
Not counted: CUDA's context and its libraries' workspaces (about 1 GB), what an allocator loses between its blocks, and
on a CPU the libraries themselves (about half a GB).
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.groups import Rows, make_rows
from pipeline.config.section import Section
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from stages.models.adapters import AdapterSettings, is_adapted, plain, share_frozen, trainable, with_adapter
from stages.models.ensemble_folder import others_of
from stages.models.families import has_family_class, name_trunk, scalar_class, weightless_causal
from stages.models.head import CHUNK, head_logprobs
from stages.models.loading import packaged_gguf, score_head, scratch_config, without_dropout
from stages.models.packing import register, sees_less, trunk_options
from stages.models.precision import cast_frozen, castable
from stages.models.quantized import Quantized
from stages.models.remote_code import SCALAR, forget, is_remote, read
from stages.models.roles import most_tokens
from stages.models.sharding import layers_of
from stages.objectives.logprobs import token_logprobs
from stages.settings.policies import reward_models
from stages.settings.training import batch_of_each
from stages.shared.runtime import adapter_settings, dtype_of
from stages.training.batching import in_micro_batches
from stages.training.text import SMALL_VOCABULARY
from stages.training.trainee import make_trainee

WIDTH = {"float32": 4, "bfloat16": 2}
Lengths = list[tuple[int, list[int]]]  # of each prompt, and of its responses


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return found

    def see(self, tensor: Tensor) -> None:
        if (storage := tensor.untyped_storage()) not in self.known:
            self.known.add(storage)
            self.grow(storage.nbytes())
            weakref.finalize(storage, self.grow, -storage.nbytes())

    def grow(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class Step:
    """A model that trains and what one micro-batch of its loss reads: `head` "logprobs", "scores" or "values" of
    `lengths`; or of `rows` rows of `width` tokens each "text", or "logits" where they are there whole. times: 2 where
    there are more micro-batches, so that a gradient is there already."""

    model: str
    head: str
    lengths: Lengths = ()
    rows: int = 0
    width: int = 0
    times: int = 1


@dataclass(frozen=True)
class Need:
    """Bytes of one stage: all weights; Adam's moments (and AdaLoRA's averages); copies that are kept (best, average);
    the most that a step has beside them (activations, gradients); and while sampling the cache, and weights cast for
    it."""

    stage: str
    weights: int
    moments: int
    kept: int
    step: int
    sampling: int = 0

    @property
    def most(self) -> int:
        return self.weights + self.moments + self.kept + max(self.step, self.sampling)


def of_experiment(experiment, device: str, trust_remote_code: bool = False) -> Iterator[Need]:
    """What base (from scratch), sft, rm, ppo and dpo need on each `device`, "cpu" or "cuda"."""
    m, dtype, ranks = experiment.model, dtype_for(experiment, device), processes(experiment)
    parts = sharers(experiment)
    config = model_config(m, trust_remote_code)
    adapter = adapter_settings(m)
    take = lambda steps, adapter=adapter: take_step(  # noqa: E731
        config, steps, adapter, dtype, device, m.gradient_checkpointing, m.attn_implementation, parts
    )
    head = "logits" if config.get_text_config().vocab_size <= SMALL_VOCABULARY else "text"
    for stage in ("base", "sft") if m.name_or_path is None else ("sft",):
        c = getattr(experiment, stage)
        rows, times = batch_of_each(c.per_device_train_batch_size, c.gradient_accumulation_steps, ranks)
        step = Step("policy", head, rows=rows, width=c.max_length + 1, times=min(2, times))
        sizes = take([step], AdapterSettings() if stage == "base" else adapter)
        trains = sizes.trains["policy"]
        kept = trains * (c.keep == "best") // parts
        if stage == "sft" and c.ppo_init is not None:
            kept += sizes.models["policy"]  # the policy that is done, while the other one trains
        buckets = trains * (ranks > 1 and parts == 1)  # DDP's
        yield replace(need(stage, sizes, kept), step=sizes.step + buckets)
    for stage, head, model in (("rm", "scores", "reward_model"), ("dpo", "logprobs", "policy")):
        if stage == "dpo":
            yield of_ppo(experiment, config, take, dtype, device)
        c = getattr(experiment, stage)
        times = -(-c.gradient_accumulation_steps // ranks) if c.per_device_train_tokens is None else 2
        sizes = take([Step(model, head, ranked(c, experiment), times=min(2, times))])
        copies = (c.keep == "best") + (len(reward_models(experiment)) - 1 if stage == "rm" else 0)
        yield need(stage, sizes, kept=copies * sizes.trains[model] // parts)


def of_ppo(experiment, config, take: Callable, dtype: str, device: str) -> Need:
    """Policy and value model train; the reference is the policy without its adapter, or a model of its own; what does
    not train is there once."""
    c, ranks = experiment.ppo, processes(experiment)
    width = (c.max_length - c.response_length, c.response_length)
    episodes, most = -(-c.mini_batch_size // ranks), most_tokens(config, device)
    parts = in_micro_batches([sum(width)] * episodes, range(episodes), 1, c.per_device_train_batch_size, most)
    of_part = {"lengths": [(width[0], [width[1]])] * max(map(len, parts)), "times": min(2, len(parts))}
    steps = [Step("policy", "logprobs", **of_part), Step("value_model", "values", **of_part)]
    if c.ptx_coef:
        rows = -(-round(c.ptx_ratio * c.mini_batch_size) // ranks)
        some = min(rows, c.per_device_train_batch_size)
        steps.append(Step("policy", "text", rows=some, width=c.ptx_length, times=1 + (rows > some)))
    sizes = take(steps)
    policy, value, scalar = sizes.trains["policy"], sizes.trains["value_model"], sizes.frozen["value_model"]
    shares = sharers(experiment)
    weights = sum(sizes.models.values()) if shares > 1 else sizes.weights
    weights += scalar * (c.held_out_reward_model is not None)
    weights += sizes.frozen["policy"] * (not sizes.adapted)  # the reference
    if c.reward_model is not None:
        weights += scalar * (1 + len(others_of(Path(c.reward_model).expanduser())))
    else:
        weights += experiment.rm.ensemble * (value if sizes.shared else scalar)
        trunk = sizes.models["value_model"] - value
        weights += trunk * (sizes.shared and experiment.sft.ppo_init is not None)  # another one
    kept = policy * (c.publish_ema + (c.keep == "best"))
    sampled = min(c.local_rollout_forward_batch_size, -(-c.batch_size // ranks))
    cache = sampled * (sum(width) * cache_of_token(config) * WIDTH[dtype] + 8 * config.get_text_config().vocab_size)
    cast = policy // 2 if dtype == "bfloat16" else 0
    if shares > 1:  # a whole copy, its linear layers cast
        cast = sizes.frozen["policy"]
    sizes = replace(sizes, weights=weights // shares)
    own = "transformers" in (c.rollout.engine, c.rollout.on_failure)  # vLLM's are its own
    return replace(need("ppo", sizes, kept // shares), sampling=own * (cache + cast))


@dataclass(frozen=True)
class Sizes:
    """What `take_step` found: bytes here of all weights together; of each model's, whole, of them if it does not train,
    and of those that train; here of moments, and the most beside them; whether models share frozen weights, and whether
    an adapter can be turned off."""

    weights: int
    models: dict[str, int]
    frozen: dict[str, int]
    trains: dict[str, int]
    moments: int
    step: int
    shared: bool
    adapted: bool


def need(stage: str, sizes: Sizes, kept: int) -> Need:
    return Need(stage, sizes.weights, sizes.moments, kept, sizes.step)


def take_step(
    config,
    steps: list[Step],
    adapter: AdapterSettings,
    dtype: str,
    device: str,
    checkpointing=False,
    attention="sdpa",
    parts=1,
) -> Sizes:
    """One optimizer step of the models that `steps` name, their micro-batches one after another, on fake tensors.
    parts: processes that share each weight (fsdp2): a layer's gradients go as soon as they are there, others after the
    pass; shares of them, and what is gathered for a pass, are added."""
    longest = max([step.width for step in steps] + [p + max(rs) for step in steps for p, rs in step.lengths])
    packed = attention == "sdpa" and not sees_less(config, longest)
    real = [laid_out(step, packed) for step in steps]  # how rows are packed hangs on their numbers
    read = [None if isinstance(x, Tensor) else int(x.lengths.sum()) for x in real]
    with quiet():
        made = {step.model: make(config, step.model, adapter, checkpointing, attention, packed) for step in steps}
    with quiet(), experts_by_shape(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        models: dict[str, nn.Module] = {}
        for name, model in made.items():
            model.to_empty(device="cpu")
            plain(model).tie_weights()
            if dtype == "bfloat16":
                cast_frozen(model, torch.bfloat16)
            if parts == 1:
                share_frozen(model, list(models.values()), same=lambda *_: True)
            for p in (p for layer in layers_of(plain(model)) for p in layer.parameters() if parts > 1):
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            models[name] = model
        weights, separate = live.now, sum(map(size_of, models.values()))
        options = {"steps": 100, "learning_rate": 1.0, "max_grad_norm": 1.0}
        trainees = [make_trainee(name, model, **options) for name, model in models.items()]
        for _ in range(2):  # in the first one Adam's moments come into being
            live.most, before, apart = live.now, live.now, []
            for head, turn in (("any", 0), ("any", 1), ("text", 0), ("text", 1)):
                for step, batch, tokens in zip(steps, real, read, strict=True):
                    if turn >= step.times or (step.head == "text") != (head == "text"):
                        continue
                    model = models[step.model]
                    if (head, turn) == ("text", 0):  # PPO keeps its own gradient apart from the text's
                        apart += [p.grad for p in trainable(model).values()]
                        model.zero_grad(set_to_none=True)
                    casts = {"enabled": dtype == "bfloat16", "cache_enabled": parts == 1}
                    with torch.autocast("cpu", torch.bfloat16, **casts):
                        loss = forward(model, step, faked(batch, tokens), device)
                    loss.sum().backward()
                    del loss
                    if parts > 1:  # those outside the layers
                        model.zero_grad(set_to_none=True)
            apart.clear()
            for trainee in trainees:
                trainee.optimizer.step()
                trainee.optimizer.zero_grad(set_to_none=True)
        trains = {name: sum(p.nbytes for p in trainable(model).values()) for name, model in models.items()}
        aside = sum(trains[step.model] for step in steps if step.head == "text" and len(steps) > 1)
        step, moments = live.most - before, before - weights
        if parts > 1:  # gradients in parts, PPO's and the text's apart; Adam has seen none
            moments = 2 * sum(trains.values())
            step += (sum(trains.values()) + aside) // parts + max(map(gathered_at_once, models.values()))
        return Sizes(
            weights=weights // parts,
            models={name: size_of(model) for name, model in models.items()},
            frozen={name: frozen_size(model, dtype) for name, model in models.items()},
            trains=trains,
            moments=moments // parts,
            step=step,
            shared=weights < separate,
            adapted=any(map(is_adapted, models.values())),
        )


@contextlib.contextmanager
def experts_by_shape() -> Iterator[None]:
    """Inside, mixtures of experts multiply by transformers' own operation for grouped rows, which knows its shapes in
    every dtype; torch's has them for bfloat16 alone."""
    from transformers.integrations import moe

    kept = getattr(moe, "_can_use_grouped_mm", None)
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        if kept is not None:
            moe._can_use_grouped_mm = kept


def make(config, name: str, adapter: AdapterSettings, checkpointing: bool, attention: str, packed: bool) -> nn.Module:
    """One of PPO's models, trained by `adapter`, without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    scalar = name in ("reward_model", "value_model")
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    config.num_labels = 1
    trust = {"trust_remote_code": is_remote(config)}  # its configuration was loaded by that
    options = trust | {"dtype": torch.float32, "attn_implementation": "eager" if attention == "eager" else "sdpa"}
    with no_init_weights(), torch.device("meta"):
        if scalar and not is_remote(config) and not has_family_class(config):
            own = scalar_class(weightless_causal(config))
            model = own._from_config(config, **{key: x for key, x in options.items() if key not in trust})
        else:
            model = kind.from_config(config, **options)
        name_trunk(without_dropout(model))
        forget(kind)
        if packed:
            register(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model = with_adapter(model, adapter, scalar=scalar)
    return model.train()


def head_is_linear(model) -> bool:
    """By the settings that transformers' models have for it: trying it out would take numbers."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    names = ("logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping", "logits_soft_cap")
    scaled = [getattr(config, name, None) for name in names]
    return type(head) is nn.Linear and head.bias is None and all(x in (None, 1.0) for x in scaled)


def forward(model, step: Step, batch, device: str) -> Tensor:
    """As stages/models/forward.py, which finds the places to read by their numbers."""
    inner, words = plain(model), step.head in ("text", "logits", "logprobs")
    if step.width:
        inputs, read = {"input_ids": batch[:, :-1], "use_cache": False}, batch[:, 1:].flatten()
        places = torch.empty(read.shape, dtype=torch.long)
    else:
        rows, read = batch
        options = trunk_options(rows)
        if "packing" in options:  # a GPU gathers rows, and these tensors say that they are a CPU's
            options["packing"].__dict__["short"] = device == "cuda" or options["packing"].short
        inputs, places = {"input_ids": rows.input_ids, **options}, rows.last if step.head == "scores" else read
    if step.head == "logits" or (words and not head_is_linear(inner)):
        return token_logprobs(model(**inputs).logits.flatten(0, 1).index_select(0, places).float(), read)
    hidden = inner.base_model(**inputs).last_hidden_state.flatten(0, 1).index_select(0, places)
    if words:
        return head_logprobs(hidden, inner.get_output_embeddings().weight, read, chunk=CHUNK[device])[0]
    with torch.autocast("cpu", enabled=False):
        return score_head(inner)(hidden.float())


def laid_out(step: Step, packed: bool) -> Rows | Tensor:
    if step.width:
        return torch.zeros(step.rows, step.width, dtype=torch.long)
    prompts = [[i] * n for i, (n, responses) in enumerate(step.lengths) for _ in responses]
    return make_rows(prompts, [[0] * n for _, responses in step.lengths for n in responses], 0, packed=packed)


def faked(batch: Rows | Tensor, tokens: int | None):
    """The same shapes without numbers; of Rows also a place for each of the response tokens."""
    empty = lambda x: torch.empty(x.shape, dtype=x.dtype)  # noqa: E731
    if isinstance(batch, Tensor):
        return empty(batch)
    parts = {f.name: empty(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    return replace(batch, **parts), torch.empty(tokens, dtype=torch.long)


def gathered_at_once(model: nn.Module) -> int:
    """Bytes of whole weights in a pass through a sharded model: those outside its layers, a layer and the next one."""
    layers = list(map(size_of, layers_of(plain(model))))
    return size_of(model) - sum(layers) + 2 * max(layers)


def frozen_size(model: nn.Module, dtype: str) -> int:
    """As if no weight trained and none was quantized: a reward model from elsewhere."""
    whole = castable(model) if dtype == "bfloat16" else []
    packed = [layer for layer in model.modules() if isinstance(layer, Quantized)]
    held = sum(p.nbytes for layer in packed for name, p in layer.named_parameters() if name != "bias")
    floats = sum(layer.in_features * layer.out_features * WIDTH[dtype] for layer in packed)
    return size_of(model) - sum(p.nbytes // 2 for p in whole if p.dtype == torch.float32) - held + floats


def size_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def ranked(c: Section, experiment) -> Lengths:
    """As many of the longest groups as one forward of rm or dpo holds; of rankings from a file: as pairs."""
    k, response = experiment.rankings.samples_per_prompt, min(experiment.rankings.response_length, c.max_length - 1)
    if experiment.data.rankings is not None:
        k, response = 2, c.max_length - 1
    group = (c.max_length - response, [response] * k)
    if c.per_device_train_tokens is None:
        return [group] * c.per_device_train_batch_size
    return [group] * max(1, c.per_device_train_tokens // (group[0] + sum(group[1])))


def cache_of_token(config) -> int:
    """Numbers that a token leaves in the cache: keys and values of all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width


def processes(experiment) -> int:
    return experiment.launch.processes * experiment.launch.nodes


def sharers(experiment) -> int:
    """How many processes hold a model that trains together."""
    return processes(experiment) if experiment.launch.strategy == "fsdp2" else 1


def dtype_for(experiment, device: str) -> str:
    """ "auto" on a GPU that is not here is bfloat16."""
    if experiment.model.dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return "bfloat16"
    return dtype_of(experiment)


def model_config(m, trust_remote_code: bool = False):
    """transformers' configuration of the model that the section `model` names."""
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
        config = read(AutoConfig, path, where="model.name_or_path", trust_remote_code=trust_remote_code, **options)
    except UserError:
        raise
    except (OSError, ValueError) as problem:
        raise UserError(f"model.name_or_path: {str(problem).splitlines()[0]}") from problem
    if is_remote(config) and SCALAR not in config.auto_map:
        remedy = "base writes one: run it, then name its artifact's model/ here"
        raise UserError(f"model.name_or_path: {m.name_or_path} brings no sequence classification; {remedy}")
    return config


@contextlib.contextmanager
def quiet():
    """peft and torch warn about tensors without numbers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
