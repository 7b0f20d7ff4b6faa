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

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.groups import Rows, make_rows
from pipeline.errors import UserError
from pipeline.sections import local_folder
from stages.common import adapter_settings, dtype_of
from stages.engine import make_trainee
from stages.models.adapters import is_adapted, plain, share_frozen, trainable, with_adapter
from stages.models.forward import text_logprobs
from stages.models.head import head_logprobs
from stages.models.loading import score_head, scratch_config, without_dropout
from stages.models.packing import register, trunk_options
from stages.models.roles import most_tokens
from stages.rollouts.collect import in_micro_batches
from stages.settings import Section, batch_of_each

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
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return found

    def forget(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Step:
    """A model that trains and what one micro-batch of its loss reads: `head` "logprobs", "scores" or "values" of
    `lengths`; or "text", `rows` rows of `width` tokens each."""

    model: str
    head: str
    lengths: Lengths = ()
    rows: int = 0
    width: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes of one stage: all weights; Adam's moments; copies that are kept (best, average); the most that a step
    has beside them (activations, gradients); and while sampling the cache, and weights cast for it."""

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
    m, dtype = experiment.model, dtype_for(experiment, device)
    config = model_config(m, trust_remote_code)
    adapter = adapter_settings(m) or {"method": None}
    take = lambda steps, adapter=adapter: take_step(  # noqa: E731
        config, steps, adapter, dtype, device, m.gradient_checkpointing, m.attn_implementation
    )
    for stage in ("base", "sft") if m.name_or_path is None else ("sft",):
        c = getattr(experiment, stage)
        rows, _ = batch_of_each(c.per_device_train_batch_size, c.gradient_accumulation_steps, processes(experiment))
        rows = Step("policy", "text", rows=rows, width=c.max_length + 1)
        sizes = take([rows], {"method": None} if stage == "base" else adapter)
        yield need(stage, sizes, kept=sizes.trains["policy"] * (c.keep == "best"))
    for stage, head, model in (("rm", "scores", "reward_model"), ("dpo", "logprobs", "policy")):
        if stage == "dpo":
            yield of_ppo(experiment, config, take, dtype, device)
        c, r = getattr(experiment, stage), experiment.rankings
        sizes = take([Step(model, head, ranked(c, r.samples_per_prompt, r.response_length))])
        copies = (c.keep == "best") + (c.ensemble - 1 if stage == "rm" else 0)
        yield need(stage, sizes, kept=copies * sizes.trains[model])


def of_ppo(experiment, config, take: Callable, dtype: str, device: str) -> Need:
    """Policy and value model train; the reference is the policy without its adapter, or a model of its own; what does
    not train is there once."""
    c = experiment.ppo
    ranks = processes(experiment)
    width = (c.max_length - c.response_length, c.response_length)
    episodes = min(c.per_device_train_batch_size, -(-c.mini_batch_size // ranks))
    parts = in_micro_batches([sum(width)] * episodes, range(episodes), 1, episodes, most_tokens(config, device))
    lengths = [(width[0], [width[1]])] * max(map(len, parts))
    steps = [Step("policy", "logprobs", lengths)]
    if c.ptx_coef:
        steps.append(Step("policy", "text", rows=c.per_device_train_batch_size, width=c.ptx_length))
    sizes = take([*steps, Step("value_model", "values", lengths)])
    policy, value = sizes.trains["policy"], sizes.trains["value_model"]
    frozen = sizes.weights - policy - value
    models = 1 if c.reward_model is not None else experiment.rm.ensemble
    scalar = sizes.models["value_model"]
    apart = value if sizes.shared and c.reward_model is None else scalar
    weights = sizes.weights + apart * models + scalar * (c.held_out_reward_model is not None)
    if not sizes.adapted:
        weights += policy if frozen else sizes.models["policy"]  # the reference, where the rest is the policy's own
    kept = policy * ((c.ema_decay is not None) + (c.keep == "best"))
    sampled = min(c.local_rollout_forward_batch_size, -(-c.batch_size // ranks))
    cache = sampled * (sum(width) * cache_of_token(config) * WIDTH[dtype] + 8 * config.get_text_config().vocab_size)
    cast = WIDTH[dtype] * sizes.models["policy"] // 4 if (device, dtype) == ("cuda", "bfloat16") else 0
    return replace(need("ppo", sizes, kept), weights=weights, sampling=cache + cast)


@dataclass(frozen=True)
class Sizes:
    """What `take_step` found: bytes of all weights together, of each model's and of those that train; moments; the
    most beside them; whether frozen weights are shared, and whether an adapter can be turned off."""

    weights: int
    models: dict[str, int]
    trains: dict[str, int]
    moments: int
    step: int
    shared: bool
    adapted: bool


def need(stage: str, sizes: Sizes, kept: int) -> Need:
    return Need(stage, sizes.weights, sizes.moments, kept, sizes.step)


def take_step(
    config, steps: list[Step], adapter: dict, dtype: str, device: str, checkpointing: bool = False, attention="sdpa"
) -> Sizes:
    """One optimizer step of the models that `steps` name, their micro-batches one after another, on fake tensors."""
    packed = attention == "sdpa"
    real = [laid_out(step, packed) for step in steps]  # how rows are packed hangs on their numbers
    read = [None if isinstance(x, Tensor) else int(x.lengths.sum()) for x in real]
    made = {step.model: make(config, step.model, adapter, checkpointing, packed) for step in steps}
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        models: dict[str, nn.Module] = {}
        for name, model in made.items():
            model.to_empty(device="cpu")
            plain(model).tie_weights()
            share_frozen(model, list(models.values()), same=lambda *_: True)
            models[name] = model
        weights, separate = live.now, sum(map(size_of, models.values()))
        trainees = [make_trainee(n, model, learning_rate=1.0, max_grad_norm=1.0) for n, model in models.items()]
        for _ in range(2):  # in the first one Adam's moments come into being
            live.most = before = live.now
            for step, batch in zip(steps, map(faked, real, read), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = forward(models[step.model], step, batch, device)
                loss.sum().backward()
                del loss
            for trainee in trainees:
                trainee.optimizer.step()
                trainee.optimizer.zero_grad(set_to_none=True)
        return Sizes(
            weights=weights,
            models={name: size_of(model) for name, model in models.items()},
            trains={name: sum(p.nbytes for p in trainable(model).values()) for name, model in models.items()},
            moments=before - weights,
            step=live.most - before,
            shared=weights < separate,
            adapted=any(map(is_adapted, models.values())),
        )


def make(config, name: str, adapter: dict, checkpointing: bool, packed: bool) -> nn.Module:
    """One of PPO's models, trained by `adapter`, without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    scalar = name in ("reward_model", "value_model")
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    config.num_labels = 1
    with no_init_weights(), torch.device("meta"):
        model = without_dropout(kind.from_config(config, dtype=torch.float32))
        if packed:
            register(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model = with_adapter(model, **adapter, scalar=scalar)
    plain(model)._head_is_linear = True  # trying it out would take numbers
    return model.train()


def forward(model, step: Step, batch, device: str) -> Tensor:
    """As stages/models/forward.py, which finds the places to read by their numbers."""
    if step.head == "text":
        return text_logprobs(model, batch)
    rows, places = batch
    options = trunk_options(rows)
    if "packing" in options:  # a GPU gathers rows, and these tensors say that they are a CPU's
        options["packing"].__dict__["short"] = device == "cuda" or options["packing"].short
    hidden = plain(model).base_model(input_ids=rows.input_ids, **options).last_hidden_state.flatten(0, 1)
    read = hidden.index_select(0, rows.last if step.head == "scores" else places)
    if step.head == "logprobs":
        return head_logprobs(read, plain(model).get_output_embeddings().weight, places)[0]
    with torch.autocast("cpu", enabled=False):
        return score_head(plain(model))(read.float())


def laid_out(step: Step, packed: bool) -> Rows | Tensor:
    if step.head == "text":
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


def size_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def ranked(c: Section, k: int, response: int) -> Lengths:
    """As many of the longest groups as one forward of rm or dpo holds."""
    response = min(response, c.max_length - 1)
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


def dtype_for(experiment, device: str) -> str:
    """"auto" on a GPU that is not here is bfloat16."""
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
        from stages.models.loading import packaged_gguf

        path, options = packaged_gguf(m.name_or_path.removeprefix("package:"))
        options = {"gguf_file": options}
    else:
        path, options = str(local_folder(m.name_or_path) or m.name_or_path), {}
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError) as problem:
        raise UserError(f"model.name_or_path: {str(problem).splitlines()[0]}") from problem


@contextlib.contextmanager
def quiet():
    """peft and torch warn about tensors without numbers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
