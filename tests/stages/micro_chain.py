"""A micro chain: data files and models of a few thousand random weights, and the run of any one stage over them.

No stage has to run before another one can be tested: what is upstream stands there, made by transformers alone. All
that a policy can say is WORDS and the end of a turn, each of them one token, so its texts and their ids are one to one.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

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

WORDS = ["the", "fox", "is", "red", "blue", "old", "kind", "what", "color", "yes", "no", "hello", "?", "."]
CONTEXT = 96
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
    """What a stage's `run` gave: its figures, the folder that it published and its journals, and the lines it said."""

    figures: dict
    folder: Path
    said: str

    def rows(self, name: str) -> list[dict]:
        """The rows of one of the folder's JSONL files."""
        return read_rows(self.folder / name)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class MicroChain:
    """Folders `root/STAGE` as the stages would have published them, and the data files that they read."""

    def __init__(self, root: Path):
        self.root = root
        self.tokenizer = make_tokenizer()
        write_data(root)
        for seed, folder in enumerate(("sft/model", "base/model", "sft/ppo_init", "ppo/model", "dpo/model")):
            self.save(random_policy(self.tokenizer, seed), folder)
        for seed, folder, bias in ((10, "rm/model", 0.3), (11, "rm/ensemble/1", -0.2), (12, "other_rm/model", 0.1)):
            self.save(random_reward_model(self.tokenizer, seed, bias), folder)
        (root / "micro.yaml").write_text(CONFIG % {"root": root}, encoding="utf-8")
        (root / "world.yaml").write_text(OF_THE_WORLD % {"root": root}, encoding="utf-8")
        self.stages = api.stages()

    def rows(self, name: str) -> list[dict]:
        """The rows of a JSONL file of the chain."""
        return read_rows(self.root / name)

    def save(self, model, folder: str) -> None:
        model.save_pretrained(self.root / folder)
        self.tokenizer.save_pretrained(self.root / folder)

    def experiment(self, *settings: str, config: str = "micro.yaml"):
        """The validated experiment, `settings` as on the command line: section.key=value."""
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
        """The stage's `run` in this process, into a new folder.

        Args:
            stage: its name.
            folder: where what it publishes and its journals go.
            settings: `section.key=value`, as on the command line.
            inputs: folders of upstream stages in the place of the chain's own.
            manifests: manifests of upstream stages; by default a digest that is the stage's name, and no figures.
            config: micro.yaml, whose data are files; or world.yaml, whose data are the embedded world's, in the input
                `world`.
            cache: the stage's cache; by default a folder of the run's own.
        """
        module, experiment = self.stages[stage], self.experiment(*settings, config=config)
        needs = all_needs(module, experiment)
        folder.mkdir(parents=True)
        said = []
        console = Console(quiet=True)
        console.print = lambda line="", **_: said.append(str(line))
        folders = {need: self.root / need for need in needs} | (inputs or {})
        set_seeds(experiment.seed, stage)
        context = StageRun(
            stage=stage,
            experiment=experiment,
            config=getattr(experiment, stage),
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
    """Every one of WORDS is a token of its own; any other text is bytes and pieces."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2 + WORDS * 2, vocab_size=400)
    for word in WORDS:
        assert len(tokenizer(word)["input_ids"]) == 1, word
    return tokenizer


def say(generator: torch.Generator, words: int) -> str:
    """A text of so many words."""
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def write_data(root: Path) -> None:
    """documents, demonstrations, prompts, evaluation prompts and rankings; in none of them a prompt stands twice."""
    generator = torch.Generator().manual_seed(0)
    prompts: list[str] = []
    while len(prompts) < 35:
        prompt = say(generator, int(torch.randint(2, 7, (), generator=generator)))
        prompts += [prompt] * (prompt not in prompts)
    write_rows(root / "prompts.jsonl", [{"prompt": p} for p in prompts[:15]])
    write_rows(root / "evaluation_prompts.jsonl", [{"prompt": p} for p in prompts[15:25]])
    answered = [{"prompt": p, "completion": say(generator, 3 + i % 4)} for i, p in enumerate(prompts[25:])]
    write_rows(root / "demonstrations.jsonl", answered)
    write_rows(root / "documents.jsonl", [{"text": say(generator, 12 + i % 5)} for i in range(19)])
    rankings = [row for i, prompt in enumerate(prompts[:30]) for row in rank(generator, prompt, 3 + i % 3, 1 + i % 2)]
    write_rows(root / "rankings.jsonl", rankings)
    held = prompts[1:30:5]
    write_rows(root / "rankings" / "train.jsonl", [row for row in rankings if row["prompt"] not in held])
    write_rows(root / "rankings" / "validation.jsonl", [row for row in rankings if row["prompt"] in held])


def rank(generator: torch.Generator, prompt: str, K: int, labelers: int) -> list[dict]:
    """Rankings of K responses to a prompt, a row a labeler: some tied, some not judged, a text that stands twice, and
    one labeler who says how sure she is."""
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
        rows.append(row | {"labeler": labeler} | ({"margin": 0.5} if labeler == "ada" else {}))
    return rows


def config_of(tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.4,  # wide, so that every token's context shows in the numbers
    )


@torch.no_grad()
def random_policy(tokenizer, seed: int):
    """Random weights that say WORDS alone, and end a turn with a probability of about a fifth.

    The first number of the hidden state is the same everywhere, so the first column of the head is a bias. Attention is
    strong: what stands before a token shows in it.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(tokenizer)).float().eval()
    model.model.embed_tokens.weight[:, 0] = 4.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 3.0
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head = model.lm_head.weight
    head[:, 0] = -200.0
    said = [tokenizer(word)["input_ids"][0] for word in WORDS]
    head[said, 0] = 0.0
    head[tokenizer.eos_token_id, 0] = 6.0
    return model


def random_reward_model(tokenizer, seed: int, bias: float):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = config_of(tokenizer)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).float().eval()
    model.config.reward_bias = bias
    return model


@dataclass(frozen=True)
class Training:
    """What a stage handed to the loop `fit`: the rows of each batch, and the weights that training began with."""

    batches: list[list[int]]
    start: dict[str, torch.Tensor]


def watch_fit(monkeypatch, module) -> list[Training]:
    """A Training for each call that `module` makes of `fit`."""
    found, true = [], module.fit

    def watched(session, accelerator, trainee, task, *rest):
        order, size = task.order, task.batch_size
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        found.append(Training(batches, {name: p.clone() for name, p in trainee.tensors().items()}))
        return true(session, accelerator, trainee, task, *rest)

    monkeypatch.setattr(module, "fit", watched)
    return found


def spy(monkeypatch, module, name: str) -> list[SimpleNamespace]:
    """Let `module.name` be what it is, and keep what each call of it was given and gave: (args, kwargs, result)."""
    calls, true = [], getattr(module, name)

    def watched(*args, **kwargs):
        call = SimpleNamespace(args=args, kwargs=kwargs, result=None)
        calls.append(call)
        call.result = true(*args, **kwargs)
        return call.result

    monkeypatch.setattr(module, name, watched)
    return calls
