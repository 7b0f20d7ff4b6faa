"""Run trl 1.12's PPOTrainer in its own environment, to measure it and to record its numbers.

    python tests/benchmarks/ppo_peer.py                  answer questions of ppo.py as JSON lines
    python tests/benchmarks/ppo_peer.py --parity FILE    write the file for tests/parity

Each question runs trl's unmodified train() for one update. Prompts come through its own
`data_collator`; clocks and recorders are patched onto names that it looks up as it runs. Of this
project only pairs.py and its protocol are imported.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from pairs import Collections, Phases, Stopwatch, peak_bytes, reset_peak, serve, versions
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

ROLES = ("policy", "ref_policy", "reward_model", "value_model")
BATCHES = 100
"""Batches in the loader; at its last one accelerate would step after every micro-batch."""
RECORDED = (
    "query_responses", "responses", "logprobs", "ref_logprobs", "values", "scores", "sequence_lengths", "rewards", "kl",
    "advantages", "returns", "padding_mask", "padding_mask_p1",
)  # fmt: skip
"""Local variables of train() that `Peer.capture` records."""


class Ids:
    """Stand in for a tokenizer with the only fields that PPOTrainer reads here."""

    def __init__(self, eos_id: int, pad_id: int):
        self.eos_token_id, self.pad_token_id = eos_id, pad_id


def step_options(batch_size: int, micro: int, steps: int) -> dict[str, int]:
    """Return the options for several optimizer steps in each pass over the batch.

    trl's batch is per_device_train_batch_size × gradient_accumulation_steps, whatever
    num_mini_batches is, and accelerate steps once in gradient_accumulation_steps micro-batches. So
    N steps of G micro-batches take N·G "mini-batches" of one micro-batch each.

    Args:
        batch_size: Episodes of the batch.
        micro: Episodes of a micro-batch.
        steps: Optimizer steps in each pass.

    Returns:
        Options of PPOConfig.
    """
    accumulation = batch_size // (micro * steps)
    assert accumulation * micro * steps == batch_size, f"{steps} × {micro} does not divide {batch_size}"
    return {
        "per_device_train_batch_size": micro * steps,
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": steps * accumulation,
    }


def left_padded(prompts: list[list[int]], pad_id: int) -> torch.Tensor:
    """Return the prompts as one tensor, padded on the left."""
    width = max(map(len, prompts))
    return torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])


class Peer:
    """Hold one PPOTrainer at a time, on models that stay loaded."""

    def __init__(self) -> None:
        self.models, self.trainer = {}, None
        self.phases, self.collections = Phases(), Collections()

    def hello(self) -> dict:
        """Return versions and the number of threads."""
        return versions("torch", "transformers", "trl", "accelerate") | {"threads": torch.get_num_threads()}

    def load(self, folders: dict[str, str], dtype: str) -> None:
        """Load the models; `folders` maps roles to folders, `dtype` is that of the weights."""
        self.models, self.trainer = {}, None
        gc.collect()
        for role in ROLES:
            auto = AutoModelForCausalLM if "policy" in role else AutoModelForSequenceClassification
            model = auto.from_pretrained(folders[role], dtype=getattr(torch, dtype))
            self.models[role] = model.requires_grad_(role in ("policy", "value_model")).eval()
        self.phases.time_prefill(self.models["policy"].base_model)

    def setup(
        self, *, batch_size: int, eos_id: int, pad_id: int, micro: int | None, options: dict, steps: int = 1
    ) -> dict:
        """Make a new trainer and optimizer on the loaded models.

        Args:
            batch_size: Episodes of an update.
            eos_id: Token that ends a response.
            pad_id: Padding.
            micro: Episodes of a micro-batch, in plain fp32 without checkpointing. None: all of that
                as in trl's defaults, except for the number of micro-batches (the batch size is
                fixed).
            options: Other options of PPOConfig.
            steps: Optimizer steps in each pass over the batch.

        Returns:
            The trainer's settings as they really are.
        """
        self.trainer = None
        gc.collect()
        GradientState._reset_state()  # or every Accelerator would share the last trainer's accumulation
        AcceleratorState._reset_state(True)
        self.steps, self.prompts, self.pad_id = steps, None, pad_id
        if micro is None:
            batching = {"gradient_accumulation_steps": batch_size // PPOConfig.per_device_train_batch_size}
        else:
            batching = {**step_options(batch_size, micro, steps), "bf16": False, "gradient_checkpointing": False}
            batching["local_rollout_forward_batch_size"] = max(64, batch_size)  # 64 is trl's default
        arguments = {
            **batching,
            **options,
            "output_dir": tempfile.gettempdir() + "/ppo_peer",
            "total_episodes": batch_size,  # one update in each train()
            "stop_token": "eos",
            "lr_scheduler_type": "constant",  # a linear schedule would end with the first train()
            "save_strategy": "no",  # the default saves at the end of every train()
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "disable_tqdm": True,
        }
        for model in self.models.values():
            model.config.pad_token_id = pad_id
        self.models["policy"].generation_config.pad_token_id = pad_id
        self.trainer = PPOTrainer(
            args=PPOConfig(**arguments),
            processing_class=Ids(eos_id, pad_id),
            model=self.models["policy"],
            ref_model=self.models["ref_policy"],
            reward_model=self.models["reward_model"],
            value_model=self.models["value_model"],
            train_dataset=range(BATCHES * batch_size),
            data_collator=lambda _: {"input_ids": left_padded(self.prompts, pad_id)},
        )
        self.phases.time_optimizer(self.trainer.optimizer.optimizer)
        args, policy = self.trainer.args, self.models["policy"]
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in policy.modules())
        return {
            "given": {k: v for k, v in arguments.items() if k != "output_dir"},
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "num_mini_batches": args.num_mini_batches,
            "local_rollout_forward_batch_size": args.local_rollout_forward_batch_size,
            "bf16": {"setting": args.bf16, "really": self.trainer.accelerator.mixed_precision},
            "gradient_checkpointing": {"setting": args.gradient_checkpointing, "really": checkpointed},
            "dtype": str(policy.dtype).removeprefix("torch."),
            "attention": policy.config._attn_implementation,
            "optimizer": f"{type(self.trainer.optimizer.optimizer).__name__} ({args.optim})",
        }

    def train(self, prompts: list[list[int]], *patches: AbstractContextManager) -> tuple[dict[str, float], dict]:
        """Run one train(), which makes one update, and check its number of optimizer steps.

        Args:
            prompts: Token ids of each prompt.
            *patches: Patches that are active meanwhile.

        Returns:
            Seconds by both clocks, and what the trainer logged.
        """
        trainer, self.prompts = self.trainer, prompts
        stepped, logged = [], {}
        watched = [self.models["policy"].base_model.norm.weight, self.models["value_model"].score.weight]
        before = [w.detach().clone() for w in watched]
        counter = trainer.optimizer.optimizer.register_step_post_hook(lambda *_: stepped.append(1))
        with ExitStack() as stack:
            for one in (patch.object(trainer, "log", logged.update), *patches):
                stack.enter_context(one)
            self.collections.take()
            watch = Stopwatch()
            trainer.train()
            clocks = watch.stop()
        counter.remove()
        expected = self.steps * trainer.args.num_ppo_epochs
        assert len(stepped) == expected, f"{len(stepped)} optimizer steps in an update instead of {expected}"
        moved = [not torch.equal(w, b) for w, b in zip(watched, before, strict=True)]
        # In bfloat16 a step of 3e-6 is smaller than the last bit of a weight.
        if self.models["policy"].dtype == torch.float32:
            assert all(moved), f"the steps changed policy, value model: {moved}"
        return clocks, logged

    def update(self, prompts: list[list[int]]) -> dict:
        """Measure one update.

        Returns:
            Seconds in total, by both clocks, and by phase, lengths of the responses, peak memory in
            bytes, and the number and seconds of trl's own collections of garbage.
        """
        phases, trainer, lengths = self.phases, self.trainer, []
        phases.take()
        reset_peak()
        forward, log, batch_generation = ppo_trainer.forward, trainer.log, ppo_trainer.batch_generation
        policy_and_value = trainer.model

        def timed_forward(model: Any, *args: Any) -> Any:
            if model is not policy_and_value:
                with phases.phase("reference"):
                    return forward(model, *args)
            if phases.now is None:  # the first forward pass of the update, which ends when trl logs
                phases.enter("update")
            return forward(model, *args)

        def timed_generation(model: Any, queries: torch.Tensor, *args: Any) -> Any:
            with phases.phase("decode"):
                generated = batch_generation(model, queries, *args)
            responses = generated[0][:, queries.shape[1] :]
            lengths.extend((responses != self.pad_id).sum(-1).tolist())
            return generated

        def timed_log(metrics: dict) -> None:
            phases.leave()
            log(metrics)

        reward_model = trainer.reward_model

        def phase_of(model: Any, *_: Any) -> str:
            return "reward" if model is reward_model else "value"

        clocks, _ = self.train(
            prompts,
            patch.object(ppo_trainer, "forward", timed_forward),
            patch.object(ppo_trainer, "batch_generation", timed_generation),
            patch.object(ppo_trainer, "get_reward", phases.timed(ppo_trainer.get_reward, phase_of)),
            patch.object(trainer, "log", timed_log),
        )
        taken = phases.take()
        taken["other"] = clocks["seconds"] - sum(taken.values())
        collected = self.collections.take()
        return {**clocks, "phases": taken, "lengths": lengths, "peak_bytes": peak_bytes(), "collections": collected}

    def capture(self, prompts: list[list[int]], responses: list[list[int]] | None = None) -> tuple[dict, dict, dict]:
        """Record one update as train() really computes it.

        Args:
            prompts: Token ids of each prompt.
            responses: Fixed responses instead of sampled ones; their logits come from trl's own
                forward.

        Returns:
            The tensors of the rollout, the gradients of each step, and losses and logged metrics.
        """
        trainer, rollout, gradients, losses = self.trainer, {}, [], []
        forward, whiten, backward = ppo_trainer.forward, ppo_trainer.masked_whiten, trainer.accelerator.backward
        done = []  # responses handed out so far: trl asks for a few rows at a time

        def fixed_responses(
            model: Any, queries: torch.Tensor, pad_id: int, _: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            part = responses[len(done) : len(done) + len(queries)]
            width = max(map(len, responses))
            done.extend(part)
            ids = torch.cat([queries, torch.tensor([r + [pad_id] * (width - len(r)) for r in part])], 1)
            logits = forward(model, ids, pad_id).logits[:, queries.shape[1] - 1 : -1]
            return ids, logits / (trainer.args.temperature + 1e-7)

        def recording_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
            rollout["advantages_before" if shift_mean else "rewards_before"] = values.clone()
            return whiten(values, mask, shift_mean)

        def recording_forward(model: Any, *args: Any) -> Any:
            if model is trainer.model and "advantages" not in rollout:
                local = sys._getframe(1).f_locals  # train()'s own variables, all of them set by now
                for name in RECORDED:
                    rollout[name] = local[name].clone()
                rollout["context_length"] = torch.tensor(local["context_length"])
            return forward(model, *args)

        def recording_backward(loss: torch.Tensor) -> None:
            local = sys._getframe(1).f_locals
            parts = (("policy", "pg_loss"), ("value", "vf_loss"), ("all", "loss"))
            losses.append({name: local[variable].item() for name, variable in parts})
            backward(loss)

        def record_gradients(*_: Any) -> None:
            named = trainer.model.named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        patches = [
            patch.object(ppo_trainer, "masked_whiten", recording_whiten),
            patch.object(ppo_trainer, "forward", recording_forward),
            patch.object(trainer.accelerator, "backward", recording_backward),
        ]
        if responses is not None:
            patches.append(patch.object(ppo_trainer, "generate", fixed_responses))
        hook = trainer.optimizer.optimizer.register_step_pre_hook(record_gradients)
        _, logged = self.train(prompts, *patches)
        hook.remove()
        return rollout, gradients, {"losses": losses, "logged": logged}

    def numbers(self, prompts: list[list[int]], file: str) -> dict:
        """Record one update and save its tensors for the benchmark.

        Args:
            prompts: Token ids of each prompt.
            file: Where the rollout and the gradients of the first step are saved (safetensors).

        Returns:
            The responses without padding, the losses and the weight of the value loss.
        """
        rollout, gradients, rest = self.capture(prompts)
        tensors = {**rollout, **{f"gradient.{n}": g for n, g in gradients[0].items()}}
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        lengths = (rollout["responses"] != self.pad_id).sum(-1).tolist()
        responses = [r[:n] for r, n in zip(rollout["responses"].tolist(), lengths, strict=True)]
        return {"responses": responses, "losses": rest["losses"], "vf_coef": self.trainer.args.vf_coef}


# The parity file: tiny models, fixed episodes, and all numbers of two steps.

PAD, EOS, VOCAB = 0, 1, 20
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
SEEDS = {"policy": 1, "ref_policy": 2, "reward_model": 3, "value_model": 4}
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 19, 12, 6], [11, 4], [18, 2, 2, 14], [6, 13], [17, 10, 5, 5, 9], [8, 16, 3]]
RESPONSES = [  # five end early, one ends with the last token, two are cut off
    [4, 12, EOS],
    [EOS],
    [9, 9, 14, 2, 7, 5],
    [15, 3, 8, 17, EOS],
    [2, EOS],
    [11, 6, 13, 13, 4, EOS],
    [19, 5, 10, 2, 2, 16],
    [7, 18, 3, EOS],
]
WEIGHTS = "A Llama whose every weight is a normal number from its own seed (× 0.5; + 1 for norms), by order of name."
"""How `tiny` draws weights, as recorded in the parity file."""
CASES = [
    {"temperature": 1.0, "kl_estimator": "k1", "whiten_rewards": False, "missing_eos_penalty": 1.0},
    {"temperature": 0.7, "kl_estimator": "k1", "whiten_rewards": True, "missing_eos_penalty": 1.0},
    {"temperature": 1.0, "kl_estimator": "k3", "whiten_rewards": True, "missing_eos_penalty": None, "gamma": 0.9},
    {"temperature": 0.7, "kl_estimator": "k3", "whiten_rewards": False, "missing_eos_penalty": 0.5, "lam": 0.8},
]
COMMON = {
    "kl_coef": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.1,
    "cliprange_value": 0.1,
    "vf_coef": 0.5,
    "num_ppo_epochs": 2,  # in the second step ratios differ from 1, and some are clipped
    "learning_rate": 0.05,
}


def tiny(auto: Any, seed: int) -> Any:
    """Make a tiny Llama whose weights are normal numbers times 0.5 (plus 1 for norms).

    Args:
        auto: Class of the model, such as AutoModelForCausalLM.
        seed: Seed of the weights, drawn in the order of their names.

    Returns:
        The model.
    """
    model = auto.from_config(transformers.LlamaConfig(**TINY, num_labels=1)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            p.copy_(0.5 * torch.randn(p.shape, generator=generator) + ("norm" in name))
    return model.eval()


def rounded(x: Any) -> Any:
    """Round every number to six digits, enough for a comparison to 1e-4."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, (list, tuple)):
        return [rounded(y) for y in x]
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return float(f"{x:.6g}") if isinstance(x, float) else x


def parity(file: Path) -> None:
    """Write every number of two steps in each case into `file`."""
    cases = []
    for case in CASES:
        peer = Peer()
        for role, seed in SEEDS.items():
            auto = AutoModelForCausalLM if "policy" in role else AutoModelForSequenceClassification
            peer.models[role] = tiny(auto, seed)
        sums = {role: sum(p.double().abs().sum().item() for p in m.parameters()) for role, m in peer.models.items()}
        settings = {**COMMON, **case}
        np.random.seed(0)
        effective = peer.setup(
            batch_size=len(PROMPTS),
            eos_id=EOS,
            pad_id=PAD,
            micro=len(PROMPTS),
            options={
                **settings,
                "response_length": max(map(len, RESPONSES)),
                "optim": "sgd",  # Adam's first step is a sign, which would magnify rounding errors
            },
        )
        rollout, gradients, rest = peer.capture(PROMPTS, RESPONSES)
        names_of_rollout = [
            "logprobs",
            "ref_logprobs",
            "values",
            "scores",
            "kl",
            "rewards",
            "advantages_before",
            "advantages",
            "returns",
        ]
        rollout = {k: rollout[k] for k in names_of_rollout}
        logged_names = ("policy/clipfrac_avg", "val/clipfrac_avg", "loss/policy_avg", "loss/value_avg")
        cases.append(
            {
                "settings": settings,
                "optimizer": effective["optimizer"],
                "rollout": rollout,
                "losses": rest["losses"],
                "logged": {name: rest["logged"][name] for name in logged_names},
                "gradients": gradients,
            }
        )
        print({k: round(v, 3) for k, v in cases[-1]["logged"].items()}, file=sys.stderr)
    whole = {
        "command": "make bench BENCH=ppo_parity",
        "versions": versions("torch", "transformers", "trl", "accelerate"),
        "weights": WEIGHTS,
        "model": TINY,
        "seeds": SEEDS,
        "absolute_sums": sums,
        "prompts": PROMPTS,
        "responses": RESPONSES,
    }
    lines = [f"{json.dumps(k)}: {json.dumps(rounded(v))}" for k, v in whole.items()]
    lines.append('"cases": [\n' + ",\n".join(json.dumps(rounded(case)) for case in cases) + "\n]")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Write the parity file or answer questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", type=Path, metavar="FILE", help="write the parity file and exit")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(False)
    if args.parity:
        parity(args.parity)
    else:
        peer = Peer()
        serve({name: getattr(peer, name) for name in ("hello", "load", "setup", "update", "numbers")})


if __name__ == "__main__":
    main()
