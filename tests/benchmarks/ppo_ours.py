"""Answer the questions of the PPO benchmark (ppo.py) with this project's PPO.

    python tests/benchmarks/ppo_ours.py

Questions and answers are JSON lines. `update` does what one turn of the loop in stages/ppo/run.py
does, with the same functions; the clocks are patched onto names that these functions look up.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate.state import AcceleratorState
from pairs import Phases, Stopwatch, peak_bytes, reset_peak, serve, settle, versions
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
from stages.ppo.options import advantage_options, sampling_options, update_options
from stages.ppo.run import advantage, reward
from stages.ppo.sampling import Sampler, make_sampler, preflight
from stages.ppo.scoring import make_scorers
from stages.ppo.update import Learners, Rates, update
from stages.rollouts import collect, transformers
from stages.rollouts.engine import EngineSpec
from stages.rollouts.rollout import DrawnPrompt
from stages.rollouts.transformers import Decoding, sample, sample_with_logprobs
from stages.scorers import reward_model
from stages.scorers.scorer import no_poll
from stages.settings import ppo as ppo_settings
from stages.settings.scorers.model import ModelScorer
from stages.shared.engines import engine_rules
from stages.shared.runtime import make_accelerator
from stages.training.trainee import Average, Skips, make_trainee

PHASES = {
    (transformers, "sample_with_logprobs"): "decode",
    (collect, "response_logprobs"): "logprobs",  # only if the sampler's log-probabilities are recomputed
    (collect, "reference_logprobs"): "reference",
    (collect, "response_values"): "value",
    (reward_model, "response_scores"): "reward",
    (ppo_update, "ppo_gradients"): "update",
    (ppo_update, "ptx_gradient"): "ptx",
}
"""(module, name of a function in it) → the phase that its time belongs to."""


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ours:
    """Hold four loaded models, and an optimizer for each of the two that learn."""

    def __init__(self) -> None:
        self.phases, self.tokens, self.step, self.recompute = Phases(), 0, 0, False

    def hello(self) -> dict:
        """Return versions and the number of threads."""
        return versions("torch", "transformers", "accelerate") | {"threads": torch.get_num_threads()}

    def craft(self, model: str, folder: str, dtype: str) -> dict:
        """Write the models of a shape into a folder; see `ppo_models.craft`."""
        return craft(SHAPES[model], Path(folder), device=DEVICE, dtype=dtype)

    def load(self, folders: dict[str, str], dtype: str) -> None:
        """Load the four models with fp32 weights, as every stage does.

        Args:
            folders: Role → its model folder.
            dtype: Data type of the products.
        """
        self.roles = self.learners = self.unpacked = None
        self.folders, self.dtype = {role: Path(folder) for role, folder in folders.items()}, dtype
        AcceleratorState._reset_state(True)  # or every Accelerator would share the last one's dtype
        roles = Roles(
            load_policy(self.folders["policy"]),
            load_policy(self.folders["ref_policy"]).requires_grad_(False),
            {"rm": load_scalar_model(self.folders["reward_model"]).requires_grad_(False)},
            load_scalar_model(self.folders["value_model"]),
            SimpleNamespace(pad_token_id=PAD, eos_token_id=None),
            make_accelerator(DEVICE, dtype),
        )
        for model in roles.models():
            model.to(roles.accelerator.device)
            model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.phases.time_prefill(roles.policy.base_model)
        longest = roles.policy.config.max_position_embeddings
        self.roles = replace(roles, packed=all([can_pack(model, longest) for model in roles.models()]))

    def count(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Count the tokens that pass through any trunk, padding included."""
        self.tokens += kwargs.get("input_ids", args[0] if args else torch.empty(0)).numel()

    def setup(self, *, options: dict, eos_id: int) -> dict:
        """Apply settings and make fresh optimizers.

        Args:
            options: Settings of the stage ppo; the others keep their defaults.
            eos_id: Token that ends a response.

        Returns:
            The settings that decide the time of an update.
        """
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
        names = ("per_device_train_batch_size", "mini_batch_size", "num_ppo_epochs", "samples_per_prompt", "ema_decay")
        names += ("local_rollout_forward_batch_size",)
        return {name: getattr(config, name) for name in names} | {"packed": self.roles.packed}

    def update(self, prompts: list[list[int]], text: list[list[int]] | None = None) -> dict:
        """Measure one update.

        Args:
            prompts: Token ids of each prompt.
            text: Rows of pretraining text for ptx; None: no ptx.

        Returns:
            Seconds in total, by both clocks, and by phase, lengths of the responses, tokens
            computed, peak memory in bytes.
        """
        self.phases.take()
        reset_peak()
        self.step, self.tokens = self.step + 1, 0
        with ExitStack() as stack:
            for (module, name), phase in PHASES.items():
                timed = self.phases.timed(getattr(module, name), self.outermost(phase))
                stack.enter_context(patch.object(module, name, timed))
            watch = Stopwatch()
            lengths = self.iterate(prompts, text)
            clocks = watch.stop()
        taken = self.phases.take()
        taken["other"] = clocks["seconds"] - sum(taken.values())
        return {**clocks, "phases": taken, "lengths": lengths, "tokens": self.tokens, "peak_bytes": peak_bytes()}

    def outermost(self, phase: str) -> Callable[..., str]:
        """Return a function that gives the phase already running or, outside of all, `phase`."""
        return lambda *_: self.phases.now or phase

    def iterate(self, prompts: list[list[int]], text: list[list[int]] | None) -> list[int]:
        """Run steps 2 to 6 of stages/ppo/run.py:run and return the responses' lengths."""
        c, roles, step = self.config, self.roles, self.step
        rows = [DrawnPrompt(ids, index) for index, ids in enumerate(prompts)]
        rollout = self.sampler(roles).rollout(rows, step, recompute=self.recompute)
        options = advantage_options(c)
        rewards = reward(rollout, c.kl_coef, c.kl_estimator, options.whiten_rewards)
        batch = advantage(rollout, rewards, options, c.kl_coef)
        if problem := not_finite_episodes(rollout, batch.advantages, step):
            raise ValueError(problem)
        next_texts = (lambda n: text[:n]) if text else None
        rates = Rates(policy=1e-6, value=1e-6)
        update(
            roles,
            self.learners,
            batch,
            update_options(c, seed=0),
            step=step,
            rates=rates,
            next_texts=next_texts,
            say=self.say,
        )
        describe(rollout, batch.returns, c.kl_coef, c.kl_estimator)
        return [len(r) for r in rollout.responses]

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        print(line, file=sys.stderr)

    def sampler(self, roles: Roles) -> Sampler:
        """Return a started sampler in which the policy of `roles` samples by itself."""
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
        scorer = make_scorers(roles, [ModelScorer(model="rm")], c.per_device_train_batch_size, shows_parts=False)
        sampler = make_sampler(
            roles, scorer, sampling_options(c), engine_rules(c.rollout), 0, "transformers", spec, self.say
        )
        sampler.start(no_poll)
        return sampler

    def sft_cost(self, text: list[list[int]], micro: int) -> float:
        """Measure transformers' own causal loss, forward and backward, on packed rows.

        Args:
            text: Rows of token ids, all of the same length.
            micro: Rows of a micro-batch.

        Returns:
            Seconds a token.
        """
        policy, began = self.roles.policy, time.perf_counter()
        for start in range(0, len(text), micro):
            ids = torch.tensor(text[start : start + micro])
            policy(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        policy.zero_grad(set_to_none=True)
        return (time.perf_counter() - began) / (len(text) * len(text[0]))

    def decode(self, prompts: list[list[int]], length: int, engine: str, seed: int) -> float:
        """Measure the time to sample responses of a fixed length.

        Args:
            prompts: Token ids of each prompt.
            length: Tokens of each response.
            engine: "ours", or "generate" for transformers' own.
            seed: Seed of the samples.

        Returns:
            Seconds.
        """
        if engine == "generate" and self.unpacked is None:
            # The policy as transformers loads it, with its own attention and weights in the dtype.
            self.unpacked = load_policy(self.folders["policy"]).to(DEVICE, getattr(torch, self.dtype))
        model, eos_id = self.roles.policy if engine == "ours" else self.unpacked, self.roles.tokenizer.eos_token_id
        seeds = [seed * len(prompts) + i for i in range(len(prompts))]
        settle()
        began = time.perf_counter()
        if engine == "ours":
            with self.roles.accelerator.autocast():
                batch_size = self.config.local_rollout_forward_batch_size
                responses = sample(model, prompts, seeds, Decoding(length, eos_id, PAD, batch_size=batch_size))
        else:
            width = max(map(len, prompts))
            ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=model.device)
            torch.manual_seed(seed)
            model.eval()
            responses = model.generate(
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
        assert all(len(r) == length for r in responses), "the prompts must be set up so that EOS cannot be sampled"
        return seconds

    def preflight(self, prompts: list[list[int]]) -> bool:
        """Return whether log-probabilities must be recomputed after sampling, as a run checks."""
        as_reference = replace(self.roles, ref_policy=self.roles.policy)
        sampler = self.sampler(as_reference)
        drawn = [DrawnPrompt(ids, index) for index, ids in enumerate(prompts)]
        self.recompute = preflight(sampler, drawn, dtype=self.dtype, max_length=self.config.max_length)
        return self.recompute

    def compare_decoding(self, prompts: list[list[int]]) -> float:
        """Compare the sampler's log-probabilities with those of the model that `generate` runs.

        Args:
            prompts: Token ids of each prompt.

        Returns:
            ‖a − b‖ / ‖b‖ of the log-probabilities of the sampled tokens.
        """
        with self.roles.accelerator.autocast():
            sampled = sample_with_logprobs(
                self.roles.policy, prompts, [7] * len(prompts), Decoding(16, eos_id=NEVER, pad_id=PAD)
            )
        with torch.no_grad():
            rows = make_rows(prompts, sampled.responses, PAD).to(DEVICE)
            expected = response_logprobs(self.unpacked, rows)
        return float(f"{((sampled.logprobs - expected).norm() / expected.norm()).item():.3g}")

    def ceilings(self) -> dict:
        """Measure the peak speed of the device; see `ppo_models.ceilings`."""
        return ceilings(DEVICE, self.dtype)

    def compare(self, prompts: list[list[int]], responses: list[list[int]], file: str, vf_coef: float) -> dict:
        """Compute the relative error of each tensor on the peer's episodes.

        The error is ‖ours − peer's‖ / ‖peer's‖, with the peer's advantages and returns. The peer
        also has a value, and puts the score, one position after the last token if there is room;
        tests/parity/test_trl_ppo.py holds every formula to the peer's.

        Args:
            prompts: Token ids of each prompt.
            responses: The peer's responses.
            file: The peer's tensors and gradients (safetensors).
            vf_coef: Weight of the value loss.

        Returns:
            Name of the tensor → relative error.
        """
        peer, temperature = load_file(file, DEVICE), self.config.temperature + 1e-7
        width = peer["responses"].shape[1]
        rows = make_rows(prompts, responses, PAD, packed=self.roles.packed).to(DEVICE)
        one_longer = [[*r, PAD][:width] for r in responses]  # the peer's values have one more position
        wide = make_rows(prompts, one_longer, PAD, packed=self.roles.packed).to(DEVICE)
        mask, slots = rows.response_mask, wide.response_mask
        logprobs = response_logprobs(self.roles.policy, rows, temperature)
        values = response_values(self.roles.value_model, wide)
        with torch.no_grad():
            reference = response_logprobs(self.roles.ref_policy, rows, temperature)
            ours = {
                "logprobs": (logprobs[mask], peer["logprobs"][mask]),
                "ref_logprobs": (reference[mask], peer["ref_logprobs"][mask]),
                "values": (values[slots], peer["values"][slots]),
                "scores": (response_scores(self.roles.reward_models["rm"], rows), peer["scores"]),
            }
        pg, _ = policy_loss(logprobs, peer["logprobs"], peer["advantages"], mask, 0.2, mask.sum())
        vf, _ = value_loss(values, peer["values"], peer["returns"], slots, 0.2, slots.sum())
        (pg + vf_coef * vf).backward()
        for role in ("policy", "value_model"):
            model = getattr(self.roles, role)
            for name, p in model.named_parameters():
                ours[f"gradient.{role}.{name}"] = (p.grad, peer.pop(f"gradient.{role}.{name}"))
            model.zero_grad(set_to_none=True)
        missing = [name for name in peer if name.startswith("gradient.")]
        assert not missing, f"gradients that only the peer has: {missing}"
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
