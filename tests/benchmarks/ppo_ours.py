"""Our PPO as a program that answers the bench's questions (ppo.py) as JSON lines.

    python tests/benchmarks/ppo_ours.py

`update` does what one turn of the loop in stages/ppo/run.py does, with its functions; the clocks hang on names it
looks up.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from stages.settings import ppo as ppo_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate.state import AcceleratorState
from pairs import Phases, peak_bytes, reset_peak, serve, settle, versions
from ppo_models import NEVER, PAD, SHAPES, ceilings, craft
from safetensors.torch import load_file

from data.groups import make_rows
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.loading import load_policy, load_scalar_model
from stages.models.packing import can_pack
from stages.models.roles import Roles
from stages.objectives.losses import policy_loss, value_loss
from stages.ppo import update as ppo_update
from stages.ppo.figures import describe, not_finite_episodes
from stages.ppo.options import advantage_options, engine_rules, sampling_options, update_options
from stages.ppo.run import advantage, reward
from stages.ppo.sampling import Sampler, make_sampler, no_poll, preflight
from stages.ppo.update import Learners, Rates, update
from stages.rollouts import collect, transformers
from stages.rollouts.engine import EngineSpec
from stages.rollouts.transformers import Decoding, sample, sample_with_logprobs
from stages.shared.runtime import make_accelerator
from stages.training.trainee import Average, Skips, make_trainee

PHASES = {  # a name that is looked up in a module → the phase its time belongs to
    (transformers, "sample_with_logprobs"): "decode",
    (collect, "response_logprobs"): "logprobs",  # where the sampler's are not the update's
    (collect, "reference_logprobs"): "reference",
    (collect, "response_values"): "value",
    (collect, "response_scores"): "reward",
    (ppo_update, "ppo_gradients"): "update",
    (ppo_update, "ptx_gradient"): "ptx",
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ours:
    """Four models that stay loaded, and an optimizer for each of the two that learn."""

    def __init__(self):
        self.phases, self.tokens, self.step, self.recompute = Phases(), 0, 0, False

    def hello(self) -> dict:
        return versions("torch", "transformers", "accelerate") | {"threads": torch.get_num_threads()}

    def craft(self, model: str, folder: str, dtype: str) -> dict:
        return craft(SHAPES[model], Path(folder), device=DEVICE, dtype=dtype)

    def load(self, folders: dict[str, str], dtype: str) -> None:
        """Weights in fp32 as in every stage; products in `dtype`."""
        self.roles = self.learners = self.unpacked = None
        self.folders, self.dtype = folders, dtype
        AcceleratorState._reset_state(True)  # the last one's dtype, which every Accelerator would share
        roles = Roles(
            load_policy(folders["policy"]),
            load_policy(folders["ref_policy"]).requires_grad_(False),
            load_scalar_model(folders["reward_model"]).requires_grad_(False),
            load_scalar_model(folders["value_model"]),
            SimpleNamespace(pad_token_id=PAD, eos_token_id=None),
            make_accelerator(DEVICE, dtype),
        )
        for model in roles.models():
            model.to(roles.accelerator.device)
            model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.phases.time_prefill(roles.policy.base_model)
        longest = roles.policy.config.max_position_embeddings
        self.roles = replace(roles, packed=all([can_pack(model, longest) for model in roles.models()]))

    def count(self, _, args, kwargs) -> None:
        """Tokens that pass through any trunk, padding too."""
        self.tokens += kwargs.get("input_ids", args[0] if args else torch.empty(0)).numel()

    def setup(self, *, options: dict, eos_id: int) -> dict:
        """Settings of stages/ppo/run.py (what they leave out keeps its default) and fresh optimizers."""
        config = ppo_settings.PPOSettings(**options)
        self.config = config
        self.roles.tokenizer.eos_token_id = eos_id
        self.learners = None
        trained = (("policy", self.roles.policy), ("value_model", self.roles.value_model))
        trainees = [make_trainee(n, m, learning_rate=1e-6, max_grad_norm=config.max_grad_norm) for n, m in trained]
        for trainee in trainees:
            self.phases.time_optimizer(trainee.optimizer)
        average = Average(config.ema_decay if config.publish_ema else None)
        average.start(trainees[0])
        self.learners = Learners(*trainees, average, Skips(0))
        named = ("per_device_train_batch_size", "mini_batch_size", "num_ppo_epochs", "samples_per_prompt", "ema_decay")
        named += ("local_rollout_forward_batch_size",)
        return {name: getattr(config, name) for name in named} | {"packed": self.roles.packed}

    def update(self, prompts: list[list[int]], text: list[list[int]] | None = None) -> dict:
        """Time one update: seconds in all and by phase, response tokens, tokens computed, peak memory."""
        self.phases.take()
        reset_peak()
        self.step, self.tokens = self.step + 1, 0
        with ExitStack() as stack:
            for (module, name), phase in PHASES.items():  # inside another of them it is that one's time
                booked = lambda *_, own=phase: self.phases.now or own  # noqa: E731
                stack.enter_context(patch.object(module, name, self.phases.timed(getattr(module, name), booked)))
            began = time.perf_counter()
            lengths = self.iterate(prompts, text)
            settle()
            seconds = time.perf_counter() - began
        taken = self.phases.take()
        taken["other"] = seconds - sum(taken.values())
        return {
            "seconds": seconds,
            "phases": taken,
            "lengths": lengths,
            "tokens": self.tokens,
            "peak_bytes": peak_bytes(),
        }

    def iterate(self, prompts, text) -> list[int]:
        """Take steps 2 to 6 of stages/ppo/run.py:run; return the responses' lengths."""
        c, roles, step = self.config, self.roles, self.step
        rollout = self.sampler(roles).rollout(prompts, range(len(prompts)), step, recompute=self.recompute)
        how = advantage_options(c)
        batch = advantage(rollout, reward(rollout, c.kl_coef, c.kl_estimator, how.whiten_rewards), how)
        if problem := not_finite_episodes(rollout, batch.advantages, step):
            raise ValueError(problem)
        next_texts = (lambda n: text[:n]) if text else None
        rates = Rates(policy=1e-6, value=1e-6)
        options = update_options(c, seed=0)
        update(roles, self.learners, batch, options, step=step, rates=rates, next_texts=next_texts, say=self.say)
        describe(rollout, batch.returns, c.kl_coef, c.kl_estimator)
        return [len(r) for r in rollout.responses]

    def say(self, line: str) -> None:
        """Print a line beside the answers."""
        print(line, file=sys.stderr)

    def sampler(self, roles: Roles) -> Sampler:
        """Return a started sampler of these models, by which the policy samples itself."""
        c = self.config
        spec = EngineSpec(
            model=Path(),
            scratch=Path(),
            log=Path(),
            device=roles.accelerator.device,
            dtype=self.dtype,
            autocast=roles.accelerator.autocast,
            pad_id=PAD,
            max_length=c.max_length,
            batch_size=c.local_rollout_forward_batch_size,
            timeout=60.0,
        )
        sampler = make_sampler(roles, sampling_options(c), engine_rules(c), 0, "transformers", spec, self.say)
        sampler.start(no_poll)
        return sampler

    def sft_cost(self, text: list[list[int]], micro: int) -> float:
        """Seconds a token of transformers' own causal loss, forward and backward, on packed rows."""
        policy, began = self.roles.policy, time.perf_counter()
        for start in range(0, len(text), micro):
            ids = torch.tensor(text[start : start + micro])
            policy(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        policy.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / (len(text) * len(text[0]))

    def decode(self, prompts: list[list[int]], length: int, engine: str, seed: int) -> float:
        """Seconds that our sampler, or transformers' generate, takes to sample `length` tokens a prompt."""
        if (
            engine == "generate" and self.unpacked is None
        ):  # the policy as transformers loads it, with its own attention, its weights in the dtype
            self.unpacked = load_policy(self.folders["policy"]).to(DEVICE, getattr(torch, self.dtype))
        model, eos_id = self.roles.policy if engine == "ours" else self.unpacked, self.roles.tokenizer.eos_token_id
        seeds = [seed * len(prompts) + i for i in range(len(prompts))]
        settle()
        began = time.perf_counter()
        if engine == "ours":
            with self.roles.accelerator.autocast():
                found = sample(
                    model,
                    prompts,
                    seeds,
                    response_length=length,
                    eos_id=eos_id,
                    pad_id=PAD,
                    batch_size=self.config.local_rollout_forward_batch_size,
                )
        else:
            width = max(map(len, prompts))
            ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=model.device)
            torch.manual_seed(seed)
            model.eval()
            found = model.generate(
                input_ids=ids,
                attention_mask=ids != PAD,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length,
                eos_token_id=eos_id,
                pad_token_id=PAD,
                use_cache=True,
            )[:, width:]
        settle()
        seconds = time.perf_counter() - began
        assert all(len(r) == length for r in found), "this is measured where EOS cannot be sampled"
        return seconds

    def preflight(self, prompts: list[list[int]]) -> bool:
        """Whether log-probs are computed again after sampling, as a run's beginning finds out."""
        as_reference = replace(self.roles, ref_policy=self.roles.policy)
        sampler = self.sampler(as_reference)
        self.recompute = preflight(sampler, prompts, dtype=self.dtype, max_length=self.config.max_length)
        return self.recompute

    def compare_decoding(self, prompts: list[list[int]]) -> float:
        """‖a − b‖ / ‖b‖ of the log-probs that the sampler gives its tokens, against the model that `generate` runs."""
        with self.roles.accelerator.autocast():
            found = sample_with_logprobs(
                self.roles.policy, prompts, [7] * len(prompts), Decoding(16, eos_id=NEVER, pad_id=PAD)
            )
        with torch.no_grad():
            rows = make_rows(prompts, found.responses, PAD).to(DEVICE)
            right = response_logprobs(self.unpacked, rows)
        return float(f"{((found.logprobs - right).norm() / right.norm()).item():.3g}")

    def ceilings(self) -> dict:
        return ceilings(DEVICE, self.dtype)

    def compare(self, prompts: list[list[int]], responses: list[list[int]], file: str, vf_coef: float) -> dict:
        """‖ours − peer's‖ / ‖peer's‖ of each tensor, on the peer's episodes and with its advantages and returns.

        The peer has a value, and puts the score, one place behind the last token where there is room; see
        tests/parity/test_trl_ppo.py, which holds every formula to the peer's.
        """
        peer, temperature = load_file(file, DEVICE), self.config.temperature + 1e-7
        width = peer["responses"].shape[1]
        make = lambda responses: make_rows(prompts, responses, PAD, packed=self.roles.packed).to(DEVICE)  # noqa: E731
        rows, wide = make(responses), make([[*r, PAD][:width] for r in responses])
        mask, slots = rows.response_mask, wide.response_mask
        logprobs = response_logprobs(self.roles.policy, rows, temperature)
        values = response_values(self.roles.value_model, wide)
        with torch.no_grad():
            reference = response_logprobs(self.roles.ref_policy, rows, temperature)
            ours = {
                "logprobs": (logprobs[mask], peer["logprobs"][mask]),
                "ref_logprobs": (reference[mask], peer["ref_logprobs"][mask]),
                "values": (values[slots], peer["values"][slots]),
                "scores": (response_scores(self.roles.reward_model, rows), peer["scores"]),
            }
        pg, _ = policy_loss(logprobs, peer["logprobs"], peer["advantages"], mask, 0.2, mask.sum())
        vf, _ = value_loss(values, peer["values"], peer["returns"], slots, 0.2, slots.sum())
        (pg + vf_coef * vf).backward()
        for role in ("policy", "value_model"):
            model = getattr(self.roles, role)
            for name, p in model.named_parameters():
                ours[f"gradient.{role}.{name}"] = (p.grad, peer.pop(f"gradient.{role}.{name}"))
            model.zero_grad(set_to_none=True)
        left = [name for name in peer if name.startswith("gradient.")]
        assert not left, f"gradients that only the peer has: {left}"
        self.preflight(prompts)
        return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in ours.items()}


if __name__ == "__main__":
    ours = Ours()
    names = [
        "hello",
        "craft",
        "load",
        "setup",
        "update",
        "sft_cost",
        "decode",
        "ceilings",
        "preflight",
        "compare",
        "compare_decoding",
    ]
    serve({name: getattr(ours, name) for name in names})
