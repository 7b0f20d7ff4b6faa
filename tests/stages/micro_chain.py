"""Make data files and random models of a few thousand weights, and run any single stage on them.

No stage has to run before another one can be tested: the upstream folders are written directly with
transformers. A policy can only generate WORDS and the end of a turn, each of them one token, so
that its texts and their ids map one to one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from data.tokenizer import train_tokenizer
from pipeline import api
from pipeline.config.validation import load_experiment
from pipeline.fingerprints import all_needs, sources
from pipeline.running import set_seeds
from pipeline.stage import Source, StageRun, StopFlag
from pipeline.store.cache import Cache
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking import Tracker, json_value
from tests.builders import tiny_causal, tiny_scalar

WORDS = ["the", "fox", "is", "red", "blue", "old", "kind", "what", "color", "yes", "no", "hello", "?", "."]
CONTEXT = 96
SHAPE = {"max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "initializer_range": 0.4}
CONFIG = """\
name: micro
seed: 5
model: {name_or_path: %(root)s/sft/model, dtype: float32}
data:
  documents: %(root)s/documents.jsonl
  demonstrations: %(root)s/demonstrations.jsonl
  prompts: %(root)s/prompts.jsonl
  evaluation_prompts: %(root)s/evaluation_prompts.jsonl
  rankings: %(root)s/rankings.jsonl
  validation_fraction: 0.3
rm: {held_out: false}
checkpoints: {every: 0}
launch: {device: cpu, threads: 1}
"""
OF_THE_WORLD = """\
name: micro
seed: 5
model: {name_or_path: %(root)s/sft/model, dtype: float32}
world: {documents: 100, demonstrations: 60, prompts: 60, evaluation_prompts: 40}
checkpoints: {every: 0}
launch: {device: cpu, threads: 1}
"""


@dataclass(frozen=True)
class Finished:
    """The outcome of a stage's `run`."""

    figures: dict
    """The figures that `run` returned."""
    folder: Path
    """The folder with the published files and the journals."""
    said: str
    """The lines that the stage printed."""

    def rows(self, name: str) -> list[dict]:
        """Return the rows of one of the folder's JSONL files."""
        return read_rows(self.folder / name)


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as a JSONL file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class MicroChain:
    """Folders `root/STAGE` as the stages would have published them, and their data files."""

    def __init__(self, root: Path):
        """Write the folders and files.

        Args:
            root: The folder for all of them.
        """
        self.root = root
        self.tokenizer = make_tokenizer()
        write_data(root)
        for seed, folder in enumerate(("sft/model", "base/model", "sft/ppo_init", "ppo/model", "dpo/model")):
            self.save(random_policy(self.tokenizer, seed), folder)
        for seed, folder, bias in ((10, "rm/model", 0.3), (11, "rm/ensemble/1", -0.2), (12, "other_rm/model", 0.1)):
            self.save(random_reward_model(self.tokenizer, seed, bias), folder)
        (root / "micro.yaml").write_text(CONFIG % {"root": root}, encoding="utf-8")
        (root / "world.yaml").write_text(OF_THE_WORLD % {"root": root}, encoding="utf-8")
        self.stages = api.all_stages()

    def rows(self, name: str) -> list[dict]:
        """Return the rows of a JSONL file of the chain."""
        return read_rows(self.root / name)

    def save(self, model, folder: str) -> None:
        """Save a model with the chain's tokenizer in a folder below `root`."""
        model.save_pretrained(self.root / folder)
        self.tokenizer.save_pretrained(self.root / folder)

    def experiment(self, *settings: str, config: str = "micro.yaml"):
        """Return the validated experiment.

        Args:
            settings: As on the command line, section.key=value.
            config: Name of the configuration file.
        """
        checks = [stage.check for stage in self.stages.values()]
        return load_experiment(self.root / config, settings, api.experiment_class(), checks)

    def run(
        self,
        stage: str,
        folder: Path,
        *settings: str,
        inputs: dict[str, Path] | None = None,
        manifests: dict[str, dict] | None = None,
        config: str = "micro.yaml",
        cache: Path | None = None,
    ) -> Finished:
        """Run a stage in this process, into a new folder.

        Args:
            stage: The stage's name.
            folder: For the published files and the journals.
            settings: `section.key=value`, as on the command line.
            inputs: Folders of upstream stages that replace the chain's.
            manifests: Manifests of upstream stages; by default the digest is the stage's name, and
                there are no figures.
            config: "micro.yaml", whose data are files; or "world.yaml", whose data are the embedded
                world's, in the input `world`.
            cache: The stage's cache; by default a folder of this run.
        """
        module, experiment = self.stages[stage], self.experiment(*settings, config=config)
        needs = all_needs(module, experiment)
        folder.mkdir(parents=True)
        said = []
        console = Console(quiet=True)
        console.print = lambda line="", **_: said.append(str(line))
        folders = {need: self.root / need for need in needs} | (inputs or {})
        set_seeds(experiment.seed, stage)
        seen = module.view(experiment)
        context = StageRun(
            stage=stage,
            experiment=seen,
            config=getattr(seen, module.section or stage),
            seed=experiment.seed,
            inputs=folders,
            manifests={need: {"digest": need, "metrics": {}} for need in needs} | (manifests or {}),
            publish=folder,
            checkpoints=CheckpointStore(folder / "checkpoints", every=experiment.checkpoints.every, keep=2, run_id="1"),
            cache=Cache(cache or folder / "cache"),
            tracker=Tracker(folder, stage, console=console),
            stop=StopFlag(),
            sources={
                kind: source if source.path else Source(path=folders["world"] / f"{kind}.jsonl")
                for kind, source in sources(module, experiment).items()
            },
        )
        figures = json_value(module.run(context))
        context.tracker.close()
        return Finished(figures, folder, "\n".join(said))


def make_tokenizer():
    """Train a tokenizer for which each of WORDS is one token; other text is bytes and pieces."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2 + WORDS * 2, vocab_size=400)
    for word in WORDS:
        assert len(tokenizer(word)["input_ids"]) == 1, word
    return tokenizer


def say(generator: torch.Generator, words: int) -> str:
    """Return a text of that many random words."""
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def write_data(root: Path) -> None:
    """Write documents, demonstrations, prompts, evaluation prompts and rankings.

    No file has a prompt twice.
    """
    generator = torch.Generator().manual_seed(0)
    prompts: list[str] = []
    while len(prompts) < 35:
        prompt = say(generator, int(torch.randint(2, 7, (), generator=generator)))
        if prompt not in prompts:
            prompts.append(prompt)
    write_rows(root / "prompts.jsonl", [{"prompt": p} for p in prompts[:15]])
    write_rows(root / "evaluation_prompts.jsonl", [{"prompt": p} for p in prompts[15:25]])
    answered = [{"prompt": p, "completion": say(generator, 3 + i % 4)} for i, p in enumerate(prompts[25:])]
    write_rows(root / "demonstrations.jsonl", answered)
    write_rows(root / "documents.jsonl", [{"text": say(generator, 12 + i % 5)} for i in range(19)])
    rankings = [row for i, prompt in enumerate(prompts[:30]) for row in rank(generator, prompt, 3 + i % 3, 1 + i % 2)]
    write_rows(root / "rankings.jsonl", rankings)
    held_out = prompts[1:30:5]
    write_rows(root / "rankings" / "train.jsonl", [row for row in rankings if row["prompt"] not in held_out])
    write_rows(root / "rankings" / "validation.jsonl", [row for row in rankings if row["prompt"] in held_out])


def rank(generator: torch.Generator, prompt: str, K: int, labelers: int) -> list[dict]:
    """Return rankings of K responses to a prompt, one row for each labeler.

    Some responses are tied, some not judged, and one text occurs twice. The first labeler also
    gives a margin.
    """
    responses = [say(generator, int(torch.randint(1, 8, (), generator=generator))) for _ in range(K)]
    if K == 4:
        responses[3] = responses[1]
    rows = []
    for labeler in ("ada", "ben")[:labelers]:
        ranks: list[int | None] = (1 + torch.randperm(K, generator=generator)).tolist()
        if K == 5:
            ranks[ranks.index(3)] = 2
            ranks[ranks.index(5)] = None
        row = {"id": f"{prompt} {labeler}", "prompt": prompt, "responses": responses, "ranks": ranks}
        row["labeler"] = labeler
        if labeler == "ada":
            row["margin"] = 0.5
        rows.append(row)
    return rows


@torch.no_grad()
def random_policy(tokenizer, seed: int):
    """Return a model that only generates WORDS and ends a turn with a probability of about 1/5.

    The first entry of its hidden state is constant, so that the first column of the head is a bias.
    Attention is strong, so that a token's logits depend clearly on the tokens before it.
    """
    model = tiny_causal("llama", seed, tokenizer, **SHAPE)
    model.model.embed_tokens.weight[:, 0] = 4.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 3.0
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head = model.lm_head.weight
    head[:, 0] = -200.0
    word_ids = [tokenizer(word)["input_ids"][0] for word in WORDS]
    head[word_ids, 0] = 0.0
    head[tokenizer.eos_token_id, 0] = 6.0
    return model


def random_reward_model(tokenizer, seed: int, bias: float):
    """Return a random reward model with a reward bias."""
    return tiny_scalar("llama", seed, tokenizer, bias, **SHAPE)


@dataclass(frozen=True)
class Training:
    """One call of the training loop `fit`."""

    batches: list[list[int]]
    """The indices of the rows of each batch."""
    start: dict[str, torch.Tensor]
    """The weights that training began with."""


def watch_fit(monkeypatch: pytest.MonkeyPatch, module) -> list[Training]:
    """Return a list that gets a Training for each call that `module` makes of `fit`."""
    trainings, fit = [], module.fit

    def watched(session, accelerator, trainee, task, *rest):
        order, size = task.order, task.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        trainings.append(Training(batches, {name: p.clone() for name, p in trainee.tensors().items()}))
        return fit(session, accelerator, trainee, task, *rest)

    monkeypatch.setattr(module, "fit", watched)
    return trainings


def spy(monkeypatch: pytest.MonkeyPatch, module, name: str) -> list[SimpleNamespace]:
    """Return a list that gets (args, kwargs, result) of each call of `module.name`."""
    calls, function = [], getattr(module, name)

    def watched(*args, **kwargs):
        call = SimpleNamespace(args=args, kwargs=kwargs, result=None)
        calls.append(call)
        call.result = function(*args, **kwargs)
        return call.result

    monkeypatch.setattr(module, name, watched)
    return calls
