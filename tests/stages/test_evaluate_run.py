"""Compute results.json again with plain transformers, one response at a time.

Only the sampled ids and their seeds are taken from the run.
"""

import functools
import itertools
import json
import math
import random
import shutil
import statistics
import weakref
from dataclasses import dataclass

import pytest
import second_route as plain
import torch
from micro_chain import spy, write_rows

from data.records import prompt_key
from data.streams import held_out
from data.world import writers as world_writers
from data.world.world import World
from pipeline.errors import UserError
from pipeline.store.checkpoints import CheckpointStore
from stages.evaluation import tools, turns
from stages.evaluation.measuring import Answered
from stages.page import samples as report_samples
from stages.page.results import NAMES, complete
from stages.rollouts.frozen import FrozenSampler
from stages.settings import evaluate as evaluate_settings

LENGTH = 8  # of a response
SMALL = {"max_length": 48, "response_length": LENGTH, "perplexity_length": 8, "batch_size": 4}
MISSING = -0.3
PLAIN = SMALL | {
    "batch_size": 8,  # two prompts of best of n at a time, four of the others
    "samples_per_prompt": 2,
    "best_of": 5,
    "temperature": 0.7,
    "missing_eos_score": MISSING,
    "base_prompt": "plain",
    "num_prompts": 9,
    "perplexity_rows": 4,
    "on_too_long": "drop",
}
ROOM = 75  # of the context of 96 for a prompt after two demonstrations: of ten questions, a few find none
FEW_SHOT = SMALL | {
    "response_length": 96 - ROOM,
    "policies": "[base, ppo]",
    "missing_eos_score": "null",
    "reward_ensemble": "min",
    "base_prompt": "few_shot",
    "few_shot_examples": 2,
}
OF_THE_WORLD = SMALL | {"max_length": 96, "samples_per_prompt": 3, "best_of": 4, "policies": "[base, dpo, best_of_n]"}


language_model, scalar_model = functools.cache(plain.language_model), functools.cache(plain.scalar_model)


@dataclass(frozen=True)
class Draw:
    """A sampled response."""

    prompt: list[int]
    """The ids of the prompt."""
    seed: int
    """The seed that it was sampled with."""
    ids: list[int]
    """The ids of the response."""


@dataclass(frozen=True)
class Run:
    """A finished run of the stage."""

    finished: object
    """The figures and the folder."""
    results: dict
    """The contents of results.json."""
    draws: dict[str, list[Draw]]
    """Each policy's samples in their order."""

    def rows(self, policy: str) -> list[dict]:
        """Return the policy's rows of responses.jsonl."""
        return [row for row in self.finished.rows("responses.jsonl") if row["policy"] == policy]

    def figures(self, policy: str) -> dict:
        """Return the policy's figures in results.json."""
        return self.results["policies"][policy]


def run_evaluate(chain, folder, choices, *more, sample=None, **options) -> Run:
    """Run the stage.

    Args:
        chain: The micro chain.
        folder: Where the run goes.
        choices: Settings of the section evaluate.
        more: Further settings, `section.key=value`.
        sample: A function in place of sampling.
        options: As of `MicroChain.run`.
    """
    settings = [f"evaluate.{key}={value}" for key, value in choices.items()]
    with pytest.MonkeyPatch.context() as patch:
        if sample is not None:
            patch.setattr(FrozenSampler, "sample", scripted(sample))
        calls = spy(patch, FrozenSampler, "sample")
        finished = chain.run("evaluate", folder, *settings, *more, **options)
    results = json.loads((finished.folder / "results.json").read_text())
    rows = [
        Draw(*row) for request, ids in drawn(calls) for row in zip(request.prompts, request.seeds, ids, strict=True)
    ]
    draws = {}
    for name in results["policies"]:
        each = choices.get("best_of", 16) if name == "best_of_n" else results["samples_per_prompt"]
        count = results["prompts"] * each
        draws[name], rows = rows[:count], rows[count:]
    assert not rows, "samples without a policy"
    return Run(finished, results, draws)


def scripted(sample):
    """Return a method for FrozenSampler.sample, with `sample` for all but greedy answers."""
    real = FrozenSampler.sample

    def method(self, policy, model, request, batch_size, poll):
        if request.temperature == 0:
            return real(self, policy, model, request, batch_size, poll)
        return sample(policy, request.prompts, request.seeds)

    return method


def drawn(calls) -> list[tuple]:
    """Return (request, ids of its responses) of each sampling that is not greedy."""
    return [(call.args[3], call.result) for call in calls if call.args[3].temperature > 0]


def chat_ids(tokenizer, prompt) -> list[int]:
    """Return the ids of a prompt, a text or a list of messages, in the chat template."""
    if isinstance(prompt, str):
        return plain.prompt_ids(tokenizer, prompt)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)


def text_of(prompt) -> str:
    """Return the text of a prompt without roles."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


@torch.no_grad()
def scores_again(chain, prompt, ids: list[int], how, missing: float | None) -> float:
    """Return the score of a response by both reward models together."""
    if missing is not None and ids[-1] != chain.tokenizer.eos_token_id:
        return missing
    models = [scalar_model(chain.root / "rm" / folder) for folder in ("model", "ensemble/1")]
    return how(plain.score(model, chat_ids(chain.tokenizer, prompt), ids).item() for model in models)


@torch.no_grad()
def kl_again(chain, run: Run, policy: str, reference: str, prompts: list, temperature: float) -> list[float]:
    """Return log π(y|x) − log π_ref(y|x) of each sample; the reference reads it as a chat."""
    own, other = (language_model(chain.root / folder) for folder in (f"{policy}/model", reference))
    draws = run.draws[policy]
    each = len(draws) // len(prompts)
    differences = []
    for i, draw in enumerate(draws):
        chat = chat_ids(chain.tokenizer, prompts[i // each])
        ours = plain.token_logps(own, draw.prompt, draw.ids, temperature).sum()
        differences.append((ours - plain.token_logps(other, chat, draw.ids, temperature).sum()).item())
    return differences


@torch.no_grad()
def perplexity_again(chain, policy: str, rows: list[list[int]]) -> float:
    """Return the perplexity of a policy on rows of ids."""
    model = language_model(chain.root / policy / "model")
    losses = [-plain.token_logps(model, row[:1], row[1:]).mean().item() for row in rows]
    return math.exp(statistics.mean(losses))


def document_rows(chain, validation: bool = True) -> list[list[int]]:
    """Return packed rows of the held-out documents (or, if not `validation`, of the others)."""
    texts = [row["text"] for row in chain.rows("documents.jsonl")]
    return plain.packed_rows(
        chain.tokenizer, [text for text in texts if (plain.hash_fraction(text) < 0.3) == validation], 8
    )


@torch.no_grad()
def draw_again(model, draw: Draw, temperature: float) -> list[int]:
    """Sample again, token by token, from the cumulative probabilities and the seed's numbers."""
    uniforms = torch.rand(LENGTH, generator=torch.Generator().manual_seed(draw.seed))
    ids: list[int] = []
    for uniform in uniforms[: len(draw.ids)]:
        logits = model(torch.tensor([draw.prompt + ids])).logits[0, -1].double()
        ids.append(int(((logits / temperature).softmax(-1).cumsum(-1) > uniform.double()).nonzero()[0]))
    return ids


def wins(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Return the share of pairs of responses to one prompt that ours win; ties count half."""
    outcomes = [(a > b) + 0.5 * (a == b) for mine, other in zip(ours, theirs, strict=True) for a in mine for b in other]
    return statistics.mean(outcomes)


def by_prompt(rows: list[dict], value) -> list[list[float]]:
    """Return value(row) of each row, a list per prompt, in the order of the rows."""
    return [[value(row) for row in some] for _, some in itertools.groupby(rows, key=lambda row: str(row["prompt"]))]


# ── own data ──


@pytest.fixture(scope="module")
def prompts(chain, tmp_path_factory):
    """Return a file of twelve prompts, and the eight of the first nine that fit."""
    rows = [row["prompt"] for row in chain.rows("evaluation_prompts.jsonl")]
    rows.insert(2, "the fox is red . " * 10)
    rows.insert(4, [{"role": "system", "content": "kind"}, {"role": "user", "content": "what color is the fox ?"}])
    file = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    write_rows(file, [{"prompt": prompt} for prompt in rows])
    return file, rows[:2] + rows[3:9]


@pytest.fixture(scope="module")
def files(chain, prompts, tmp_path_factory):
    """Run all policies, base in plain text, with two samples each and two reward models."""
    figures = {"accuracy": 0.61, "n_pairs": 44, "ece": 0.2, "reward_bias": 0.3}
    return run_evaluate(
        chain,
        tmp_path_factory.mktemp("files") / "one",
        PLAIN,
        f"data.evaluation_prompts={prompts[0]}",
        f"ppo.missing_eos_score={MISSING}",
        manifests={"rm": {"digest": "rm", "metrics": figures}},
    )


@pytest.fixture(scope="module")
def few_shot(chain, tmp_path_factory):
    """Run base (few-shot), ppo (from ppo_init, with another judge) and SFT."""
    more = ("sft.ppo_init={num_train_epochs: 1}", "ppo.missing_eos_score=null", "ppo.reward_ensemble=min")
    judge = f"ppo.reward_model={chain.root}/other_rm/model"
    return run_evaluate(chain, tmp_path_factory.mktemp("few") / "shot", FEW_SHOT, *more, judge)


class TestResponses:
    """Check the queries and the samples."""

    def test_every_policy_answers_every_prompt_in_order(self, files, prompts):
        assert list(files.results["policies"]) == ["base", "sft", "ppo", "dpo", "best_of_n"]
        for name in files.results["policies"]:
            samples = 1 if name == "best_of_n" else 2
            expected = [(prompt, k) for prompt in prompts[1] for k in range(samples)]
            assert [(row["prompt"], row["sample"]) for row in files.rows(name)] == expected
        assert (files.results["prompts"], files.results["samples_per_prompt"]) == (8, 2)
        assert "8 rows, 0 truncated, 1 dropped" in files.finished.said

    def test_policies_are_prompted_by_the_chat_template_and_base_in_plain_text(self, chain, files, prompts):
        for name, draws in files.draws.items():
            each = len(draws) // 8
            for i, draw in enumerate(draws):
                prompt = prompts[1][i // each]
                alone = chain.tokenizer(text_of(prompt), add_special_tokens=False)["input_ids"]
                assert draw.prompt == (alone if name == "base" else chat_ids(chain.tokenizer, prompt))
        assert [row["asked"] for row in files.results["policies"].values()] == ["plain", *["chat"] * 4]
        assert "base is prompted in plain text" in files.finished.said

    def test_each_is_drawn_from_its_own_model_at_the_temperature(self, chain, files):
        for name in ("base", "sft", "ppo", "dpo", "best_of_n"):
            model = language_model(chain.root / ("sft" if name == "best_of_n" else name) / "model")
            for draw in files.draws[name][:6]:
                assert draw_again(model, draw, 0.7) == draw.ids
        assert any(draw_again(model, draw, 1.0) != draw.ids for draw in files.draws["sft"])

    def test_published_is_what_was_sampled(self, chain, files):
        eos = chain.tokenizer.eos_token_id
        for name in ("base", "sft", "ppo", "dpo"):
            for row, draw in zip(files.rows(name), files.draws[name], strict=True):
                assert row["finished"] == (draw.ids[-1] == eos)
                assert plain.response_ids(chain.tokenizer, row["response"], row["finished"]) == draw.ids
        ended = [row["finished"] for row in files.rows("sft")]
        assert any(ended) and not all(ended)

    def test_samples_of_a_prompt_differ_and_best_of_n_draws_others_than_sft(self, files):
        seeds = {name: [draw.seed for draw in draws] for name, draws in files.draws.items()}
        for name, some in seeds.items():
            assert len(set(some)) == len(some), name
        assert seeds["base"] == seeds["sft"] == seeds["ppo"] == seeds["dpo"], "luck is the same for all"
        assert len(seeds["best_of_n"]) == 8 * 5 and not set(seeds["best_of_n"]) & set(seeds["sft"])
        texts = by_prompt(files.rows("sft"), lambda row: row["response"])
        assert sum(one != other for one, other in texts) > 4

    def test_base_after_some_demonstrations(self, chain, few_shot):
        """The same two precede each question, or only the last if both do not fit."""
        examples = {
            f"Question: {row['prompt']}\nAnswer: {row['completion']}\n\n" for row in chain.rows("demonstrations.jsonl")
        }
        shown = {}
        for row, draw in zip(few_shot.rows("base"), few_shot.draws["base"], strict=True):
            text = chain.tokenizer.decode(draw.prompt).strip()
            before, question, rest = text.rpartition(f"Question: {row['prompt']}\nAnswer:")
            assert question and not rest and len(draw.prompt) <= ROOM
            assert not set(draw.prompt) & set(chain.tokenizer.all_special_ids)
            shown[row["prompt"]] = [f"{part}\n\n" for part in before.split("\n\n")[:-1]]
            assert set(shown[row["prompt"]]) <= examples
        most = max(shown.values(), key=len)
        assert len(most) == 2 == len(set(most))
        for prompt, some in shown.items():
            whole = "".join(most) + f"Question: {prompt}\nAnswer:"
            assert some == (most if len(chain.tokenizer(whole)["input_ids"]) <= ROOM else most[1:])
        assert {len(some) for some in shown.values()} == {1, 2}
        assert few_shot.figures("base")["asked"] == "few_shot"
        assert few_shot.figures("ppo")["asked"] == few_shot.figures("sft")["asked"] == "chat"


class TestFigures:
    def test_scores(self, chain, files):
        """It is the mean of both reward models, or a fixed score without EOS."""
        for name in ("base", "sft", "ppo", "dpo"):
            expected = [
                scores_again(chain, row["prompt"], draw.ids, lambda scores: statistics.mean(list(scores)), MISSING)
                for row, draw in zip(files.rows(name), files.draws[name], strict=True)
            ]
            assert [row["score"] for row in files.rows(name)] == pytest.approx(expected, abs=1e-4), name
            assert files.figures(name)["score"] == pytest.approx(statistics.mean(expected), abs=1e-4)

    def test_scores_of_the_least_of_two_models(self, chain, few_shot):
        """Without missing_eos_score, a response that was cut off keeps its own score."""
        for name in ("base", "ppo"):
            expected = [
                scores_again(chain, row["prompt"], draw.ids, min, None)
                for row, draw in zip(few_shot.rows(name), few_shot.draws[name], strict=True)
            ]
            assert [row["score"] for row in few_shot.rows(name)] == pytest.approx(expected, abs=1e-4), name

    def test_best_of_n_is_the_highest_of_its_own_samples(self, chain, files, prompts):
        draws, choices = files.draws["best_of_n"], set()
        for i, row in enumerate(files.rows("best_of_n")):
            mean = lambda scores: statistics.mean(list(scores))  # noqa: E731
            own = draws[5 * i : 5 * i + 5]
            scores = [scores_again(chain, prompts[1][i], draw.ids, mean, MISSING) for draw in own]
            best = max(range(5), key=scores.__getitem__)
            assert row["score"] == pytest.approx(scores[best], abs=1e-4)
            assert plain.response_ids(chain.tokenizer, row["response"], row["finished"]) == own[best].ids
            choices.add(best)
        assert len(choices) > 2
        figures = files.figures("best_of_n")
        assert figures["kl_to_sft"] is None and figures["pretrain_perplexity"] is None

    def test_lengths_and_ends(self, files):
        for name in ("base", "sft", "ppo", "dpo"):
            figures, draws = files.figures(name), files.draws[name]
            assert figures["length"] == pytest.approx(statistics.mean(len(draw.ids) for draw in draws))
            assert figures["eos_rate"] == pytest.approx(statistics.mean(row["finished"] for row in files.rows(name)))

    def test_kl_to_sft(self, chain, files, prompts):
        """The policy reads its own query, and SFT reads the same answer in the chat."""
        for name in ("base", "sft", "ppo", "dpo"):
            expected = kl_again(chain, files, name, "sft/model", prompts[1], 0.7)
            assert files.figures(name)["kl_to_sft"] == pytest.approx(statistics.mean(expected), abs=1e-3), name
        assert files.figures("sft")["kl_to_sft"] == 0.0 < files.figures("dpo")["kl_to_sft"]

    def test_kl_is_to_the_policy_that_ppo_began_from(self, chain, few_shot):
        """ppo_init, where SFT trained one: SFT itself has a KL then. Of few-shot answers, too."""
        prompts = [row["prompt"] for row in few_shot.rows("sft")]
        for name in ("base", "sft", "ppo"):
            expected = kl_again(chain, few_shot, name, "sft/ppo_init", prompts, 1.0)
            assert few_shot.figures(name)["kl_to_sft"] == pytest.approx(statistics.mean(expected), abs=1e-3), name
        assert few_shot.figures("sft")["kl_to_sft"] > 0.1

    def test_perplexity_is_of_the_first_document_rows(self, chain, files, few_shot):
        rows = document_rows(chain)
        assert len(rows) > 5
        for run, count in ((files, 4), (few_shot, len(rows))):
            for name in set(run.results["policies"]) - {"best_of_n"}:
                perplexity = run.figures(name)["pretrain_perplexity"]
                assert perplexity == pytest.approx(perplexity_again(chain, name, rows[:count]), rel=1e-4), name
        others = perplexity_again(chain, "base", document_rows(chain, validation=False))
        assert others != pytest.approx(few_shot.figures("base")["pretrain_perplexity"], rel=1e-2)

    def test_wins_and_differences_by_the_reward_model(self, files):
        sft = by_prompt(files.rows("sft"), lambda row: row["score"])
        for name in ("base", "sft", "ppo", "dpo"):
            own = by_prompt(files.rows(name), lambda row: row["score"])
            figures = files.figures(name)
            assert figures["win_rate_vs_sft"]["value"] == pytest.approx(wins(own, sft))
            gaps = [statistics.mean(a) - statistics.mean(b) for a, b in zip(own, sft, strict=True)]
            if name == "sft":
                assert figures["difference_to_sft"] is None
            else:
                assert figures["difference_to_sft"]["value"] == pytest.approx(statistics.mean(gaps), abs=1e-6)
        assert files.figures("base")["win_rate_vs_sft"]["value"] != 0.5

    def test_intervals_are_over_prompts(self, files):
        """It is Student's interval of eight means of two samples, not of sixteen samples."""
        assert files.results["clusters"] == files.figures("dpo")["win_rate_vs_sft"]["clusters"] == 8
        means = [statistics.mean(some) for some in by_prompt(files.rows("dpo"), lambda row: row["score"])]
        half = 2.36462 * statistics.stdev(means) / math.sqrt(8)  # t of 7 degrees of freedom
        center = statistics.mean(means)
        assert files.figures("dpo")["ci95"]["score"] == pytest.approx([center - half, center + half], rel=1e-4)

    def test_a_judge_that_was_climbed_is_marked(self, files, few_shot):
        """Best of n and PPO climbed it, unless PPO had another judge; DPO did not."""
        climbed = {name: row["judge_climbed"] for name, row in files.results["policies"].items()}
        assert climbed == {"base": False, "sft": False, "ppo": True, "dpo": False, "best_of_n": True}
        assert files.results["judge"] == "reward_model"
        assert files.figures("best_of_n")["win_rate_vs_sft"] is None
        assert files.figures("ppo")["win_rate_vs_sft"] is not None
        assert not few_shot.figures("ppo")["judge_climbed"]

    def test_what_the_manifest_says(self, files, few_shot):
        for run in (files, few_shot):
            ppo, figures = run.figures("ppo"), run.finished.figures
            assert (figures["score"], figures["win_rate_vs_sft"]) == (ppo["score"], ppo["win_rate_vs_sft"]["value"])
            assert (figures["gold"], figures["prompts"]) == (None, run.results["prompts"])
            assert figures["leaked"] == run.results["leaked"]
        about = files.results["reward_model"]
        assert (about["accuracy"], about["n_pairs"], about["ece"]) == (0.61, 44, 0.2)
        assert about["orders_as_gold"] is None and "reward_bias" not in about
        assert not {"gold", "known_task", "cluster"} & set(files.rows("sft")[0])


class TestOverOptimisation:
    """Check the figures that tell whether the score can be trusted without gold."""

    def test_rows_have_their_length_and_the_reward_models_own_score(self, chain, files):
        """The last one also of answers that were cut, whose score is a fixed one."""
        for name in ("base", "sft", "ppo"):
            rows, draws = files.rows(name), files.draws[name]
            assert [row["length"] for row in rows] == [len(draw.ids) for draw in draws]
            expected = [
                scores_again(chain, row["prompt"], draw.ids, lambda scores: statistics.mean(list(scores)), None)
                for row, draw in zip(rows, draws, strict=True)
            ]
            assert [row["raw_score"] for row in rows] == pytest.approx(expected, abs=1e-4), name
        cut = [row for row in files.rows("sft") if not row["finished"]]
        assert cut and all(abs(row["score"] - MISSING) < 1e-6 for row in cut)
        assert all(abs(row["raw_score"] - MISSING) > 1e-4 for row in cut)
        assert not any("judges" in row for row in files.rows("sft"))

    def test_the_checks_are_of_all_policies(self, files):
        every = files.results["overoptimisation"]
        assert list(every) == list(files.results["policies"])
        for name, checks in every.items():
            rows = files.rows(name)
            assert checks["cut"]["n"] == sum(not row["finished"] for row in rows)
            ended = [row["raw_score"] for row in rows if row["finished"]]
            assert checks["cut"]["finished_score"] == (pytest.approx(statistics.mean(ended)) if ended else None)
            assert checks["held_out"] is None
        assert (files.results["missing_eos_score"], files.results["response_length"]) == (MISSING, LENGTH)

    def test_a_held_out_reward_model_scores_every_answer(self, chain, tmp_path):
        """It is not part of the ensemble: the policies' scores are the same without it."""
        shutil.copytree(chain.root / "rm", tmp_path / "rm")
        shutil.copytree(chain.root / "other_rm", tmp_path / "rm" / "held_out")
        choices = SMALL | {"best_of": 3, "policies": "[ppo, best_of_n]", "num_prompts": 6}
        judge = scalar_model(chain.root / "other_rm/model")
        run, bare = (
            run_evaluate(chain, tmp_path / name, choices, **more)
            for name, more in (("with", {"inputs": {"rm": tmp_path / "rm"}}), ("bare", {}))
        )
        for name in ("sft", "ppo"):
            rows = run.rows(name)
            for row, draw in zip(rows, run.draws[name], strict=True):
                ended = draw.ids[-1] == chain.tokenizer.eos_token_id
                with torch.no_grad():
                    own = plain.score(judge, chat_ids(chain.tokenizer, row["prompt"]), draw.ids).item()
                assert row["judges"]["held_out"] == pytest.approx(own if ended else -1.0, abs=1e-4)
            judged = run.results["overoptimisation"][name]["held_out"]
            assert judged["score"]["value"] == pytest.approx(statistics.mean(row["judges"]["held_out"] for row in rows))
        pair = [by_prompt(run.rows(n), lambda row: row["judges"]["held_out"]) for n in ("ppo", "sft")]
        judged = run.results["overoptimisation"]["ppo"]["held_out"]
        assert judged["win_rate_vs_sft"]["value"] == pytest.approx(wins(*pair))
        gap = statistics.mean(a[0] - b[0] for a, b in zip(*pair, strict=True))
        assert judged["difference_to_sft"]["value"] == pytest.approx(gap)
        strip = lambda row: {k: v for k, v in row.items() if k != "judges"}  # noqa: E731
        assert [strip(r) for r in run.finished.rows("responses.jsonl")] == bare.finished.rows("responses.jsonl")
        assert all("held_out" in row["judges"] for row in run.rows("best_of_n"))


@pytest.fixture(scope="module")
def kept(chain, tmp_path_factory):
    """Run all policies, with another reward model as the one that rm trained to judge."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(chain.root / "rm", folder / "rm")
    shutil.copytree(chain.root / "other_rm", folder / "rm" / "judge")
    figures = {"accuracy": 0.6, "judges": {"kept": {"accuracy": 0.58, "accuracy_ci95": [0.5, 0.66], "n_pairs": 90,
                                                    "rankings": 40, "labelers_apart": True}}}  # fmt: skip
    manifests = {"rm": {"digest": "rm", "metrics": figures}}
    choices = SMALL | {"best_of": 3, "num_prompts": 6}
    return run_evaluate(chain, folder / "out", choices, inputs={"rm": folder / "rm"}, manifests=manifests)


class TestKeptJudge:
    """Check the judge that nothing climbed, which decides where there is no gold."""

    def test_it_scores_every_answer_and_decides(self, chain, kept):
        judge = scalar_model(chain.root / "other_rm/model")
        for name in ("sft", "ppo"):
            for row, draw in zip(kept.rows(name), kept.draws[name], strict=True):
                with torch.no_grad():
                    own = plain.score(judge, chat_ids(chain.tokenizer, row["prompt"]), draw.ids).item()
                ended = draw.ids[-1] == chain.tokenizer.eos_token_id
                assert row["judges"]["kept"] == pytest.approx(own if ended else -1.0, abs=1e-4)
        assert (kept.results["judge"], kept.results["judge_name"]) == ("reward_model", "kept")
        own, sft = (by_prompt(kept.rows(name), lambda row: row["judges"]["kept"]) for name in ("ppo", "sft"))
        figures = kept.figures("ppo")
        assert figures["win_rate_vs_sft"]["value"] == pytest.approx(wins(own, sft)) and not figures["judge_climbed"]
        assert figures["judges"]["reward_model"]["climbed"] and figures["judges"]["reward_model"]["win_rate_vs_sft"]

    def test_best_of_n_wins_by_it_and_has_no_win_rate_by_its_selector(self, kept):
        best = kept.figures("best_of_n")
        own, sft = (by_prompt(kept.rows(name), lambda row: row["judges"]["kept"]) for name in ("best_of_n", "sft"))
        assert best["win_rate_vs_sft"]["value"] == pytest.approx(wins(own, sft)) and not best["judge_climbed"]
        assert best["judges"]["reward_model"]["win_rate_vs_sft"] is None

    def test_what_is_known_of_it_stands_beside_its_verdicts(self, kept, files):
        judges = kept.results["judges"]
        assert list(judges) == ["kept", "reward_model"]
        assert (judges["kept"]["accuracy"], judges["kept"]["n_pairs"], judges["kept"]["climbed"]) == (0.58, 90, [])
        assert judges["reward_model"]["climbed"] == ["best_of_n", "ppo"]
        assert judges["reward_model"]["selected"] == ["best_of_n"]
        assert "climbed the only judge" not in kept.finished.said
        assert "best_of_n and ppo climbed the only judge, the reward model" in files.finished.said

    def test_a_copy_of_it_that_ppo_climbed_is_marked(self, chain, tmp_path):
        shutil.copytree(chain.root / "rm", tmp_path / "rm")
        shutil.copytree(chain.root / "other_rm", tmp_path / "rm" / "judge")
        more = f"ppo.reward_model={chain.root}/other_rm/model"
        choices = SMALL | {"policies": "[ppo]", "num_prompts": 4}
        run = run_evaluate(chain, tmp_path / "out", choices, more, inputs={"rm": tmp_path / "rm"})
        ppo = run.figures("ppo")
        assert ppo["judge_climbed"] and not ppo["judges"]["reward_model"]["climbed"]
        selector = (f"ppo.held_out_reward_model={chain.root}/other_rm/model", "ppo.keep=best")
        run = run_evaluate(chain, tmp_path / "best", choices, *selector, inputs={"rm": tmp_path / "rm"})
        assert run.figures("ppo")["judge_climbed"], "it chose which policy is published"


class TestAsInTraining:
    """Check what is said where responses are not sampled as in training."""

    def test_temperature_and_lengths(self, chain, tmp_path):
        choices = SMALL | {"policies": "[ppo, dpo]", "num_prompts": 4, "best_of": 1, "temperature": 0.5}
        same = ("ppo.response_length=8", "ppo.max_length=48", "rm.max_length=40", "dpo.max_length=60")
        run = run_evaluate(chain, tmp_path / "out", choices, *same)
        found = {(row["setting"], row["training"]) for row in run.results["differs_from_training"]}
        assert found == {("evaluate.temperature", "ppo.temperature"), ("evaluate.max_length", "rm.max_length")}
        assert "evaluate.temperature is 0.5 and ppo.temperature 1.0" in run.finished.said

    def test_nothing_is_said_where_all_is_the_same(self, chain, tmp_path):
        choices = SMALL | {"policies": "[ppo]", "num_prompts": 4, "best_of": 1}
        run = run_evaluate(chain, tmp_path / "out", choices, "ppo.response_length=8", "ppo.max_length=48")
        assert run.results["differs_from_training"] == [] and "training saw other" not in run.finished.said


class TestGreedy:
    """Check the greedy answers, which have more room to end."""

    def test_responses_are_the_likeliest_tokens_after_each_policys_form_of_prompt(self, chain, files, prompts):
        rows = files.finished.rows("greedy.jsonl")
        eos = chain.tokenizer.eos_token_id
        assert {row["policy"] for row in rows} == {"base", "sft", "ppo", "dpo"}, "best of n has no likeliest answer"
        for row in rows:
            prompt = prompts[1][row["index"]]
            assert row["prompt"] == prompt
            ids = chat_ids(chain.tokenizer, prompt)
            if row["policy"] == "base":
                ids = chain.tokenizer(text_of(prompt), add_special_tokens=False)["input_ids"]
            model = language_model(chain.root / row["policy"] / "model")
            again = plain.greedy(model, ids, 4 * LENGTH, eos)
            assert row["response"] == chain.tokenizer.decode(again, skip_special_tokens=True).strip()
            assert (row["length"], row["finished"]) == (len(again), again[-1] == eos)
            if row["policy"] != "base" and len(ids) + len(again) <= 48:
                own = scores_again(chain, prompt, again, lambda scores: statistics.mean(list(scores)), MISSING)
                assert row["score"] == pytest.approx(own, abs=1e-4)
        assert any(row["length"] > LENGTH for row in rows), "the length that is scored cuts none of them"

    def test_the_prompts_are_those_that_the_report_shows(self, files):
        rows = files.finished.rows("greedy.jsonl")
        shown = report_samples.side_by_side(
            files.finished.rows("responses.jsonl"),
            rows,
            complete(files.results),
            NAMES,
            12,
            report_samples.SystemPrompts(),
        )
        answers = [answer for _, prompts in shown for prompt in prompts for answer in prompt.answers]
        assert answers and all(answer.greedy is not None for answer in answers if answer.policy != "best_of_n")

    def test_settings_of_greedy_responses(self, chain, tmp_path):
        choices = SMALL | {"best_of": 1, "policies": "[ppo]", "num_prompts": 4}
        none = run_evaluate(chain, tmp_path / "none", choices | {"greedy_prompts": 0})
        assert none.finished.rows("greedy.jsonl") == []
        some = run_evaluate(chain, tmp_path / "some", choices | {"greedy_prompts": 3, "greedy_length": 2})
        rows = some.finished.rows("greedy.jsonl")
        assert len(rows) == 6 and max(row["length"] for row in rows) <= 2


def test_what_ends_the_stage_names_the_policy_and_a_judge_that_was_climbed(files, of_world):
    """The last line of the stage is made of these."""
    from pipeline.record import headline

    line = " · ".join(headline(evaluate_settings.STAGE, files.finished.figures))
    assert line.startswith("policy ppo · score ")
    assert line.endswith("judged by the reward model that it was trained to please or selected by")
    assert "judged" not in " · ".join(headline(evaluate_settings.STAGE, of_world.finished.figures))


def test_policies_that_are_left_out_are_not_sampled(few_shot):
    assert list(few_shot.results["policies"]) == ["base", "sft", "ppo"]
    assert few_shot.results["prompts"] == 10


class TestAgain:
    def again(self, chain, files, prompts, folder):
        more = (f"data.evaluation_prompts={prompts[0]}", f"ppo.missing_eos_score={MISSING}")
        metrics = files.results["reward_model"]
        return run_evaluate(chain, folder, PLAIN, *more, manifests={"rm": {"digest": "rm", "metrics": metrics}})

    def test_the_same_run_gives_the_same_files(self, chain, files, prompts, tmp_path):
        twice = self.again(chain, files, prompts, tmp_path / "two")
        for name in ("results.json", "responses.jsonl"):
            assert (twice.finished.folder / name).read_bytes() == (files.finished.folder / name).read_bytes()

    @pytest.mark.parametrize("spoken, sampled, loaded", [(4, 8 * 5, 5), (5, 0, 5), (6, 0, 4)])
    def test_what_models_said_before_is_not_asked_again(
        self, chain, files, prompts, tmp_path, monkeypatch, spoken, sampled, loaded
    ):
        """Resume before best of n is drawn, before the reference reads answers, and after it."""
        with monkeypatch.context() as patch:
            saves = spy(patch, CheckpointStore, "save")
            self.again(chain, files, prompts, tmp_path / "two")
        states = {call.args[1]: call.args[3]["answered"] for call in saves}
        assert list(states) == [1, 2, 3, 4, 5, 6], "five policies and SFT; after the reward model all is done"
        before = json.loads(json.dumps(states[spoken]))
        monkeypatch.setattr(turns, "answered_before", lambda _: {name: Answered(**own) for name, own in before.items()})
        calls, loads = spy(monkeypatch, FrozenSampler, "sample"), spy(monkeypatch, tools, "load_policy")
        choices = [f"evaluate.{key}={x}" for key, x in PLAIN.items()]
        more = (f"data.evaluation_prompts={prompts[0]}", f"ppo.missing_eos_score={MISSING}")
        manifests = {"rm": {"digest": "rm", "metrics": files.results["reward_model"]}}
        finished = chain.run("evaluate", tmp_path / "three", *choices, *more, manifests=manifests)
        assert sum(len(request.prompts) for request, _ in drawn(calls)) == sampled
        assert len(loads) == loaded, "four to answer greedily; SFT draws best of n and is the reference"
        for name in ("results.json", "responses.jsonl"):
            assert (finished.folder / name).read_bytes() == (files.finished.folder / name).read_bytes()

    def test_one_model_at_a_time_is_loaded(self, chain, files, prompts, tmp_path, monkeypatch):
        """Policies, their reference and the judge; the two models of an ensemble score together."""
        loaded, most = [], []

        def watched(load, beside):
            def method(folder, **options):
                alive = [one() for one in loaded if one() is not None]
                assert len(alive) <= beside and not any(hasattr(one, "lm_head") for one in alive)
                del alive
                model = load(folder, **options)
                loaded.append(weakref.ref(model))
                most.append(sum(one() is not None for one in loaded))
                return model

            return method

        monkeypatch.setattr(tools, "load_policy", watched(tools.load_policy, 0))
        monkeypatch.setattr(tools, "load_scalar_model", watched(tools.load_scalar_model, 1))
        choices = [f"evaluate.{key}={x}" for key, x in PLAIN.items()]
        more = (f"data.evaluation_prompts={prompts[0]}", f"ppo.missing_eos_score={MISSING}")
        manifests = {"rm": {"digest": "rm", "metrics": files.results["reward_model"]}}
        finished = chain.run("evaluate", tmp_path / "two", *choices, *more, manifests=manifests)
        assert most == [1] * 5 + [1, 2] + [1] * 4 + [1, 2], "the reward model reads the greedy answers too"
        name = "responses.jsonl"
        assert (finished.folder / name).read_bytes() == (files.finished.folder / name).read_bytes()

    def test_a_checkpoint_of_another_version_is_refused(self, tmp_path):
        store = CheckpointStore(tmp_path, every=0, keep=2, run_id="1")
        store.save(1, {}, {"policies": {"base": {}}})
        with pytest.raises(UserError, match="--restart"):
            turns.answered_before(store)
        assert turns.answered_before(CheckpointStore(tmp_path / "none", 0, 2, "1")) == {}


class TestNearCopies:
    ASKED = (
        "What color IS the fox, old kind red blue?",  # a demonstration's, in other letters
        "hello ? " + "the fox is red and the old one is blue and kind , is it not so , no or yes ?",  # a greeting
        "tell me of the sea and of the ships that come and go",  # a prompt of PPO's alone
        "which of the hills is the one where it never rains",  # a ranking's
        "what color is the sky , old kind green blue ?",  # nobody's, but like the first
        "how many days does the long road to the north take",
    )

    def run(self, chain, folder, policies):
        write_rows(folder / "asked.jsonl", [{"prompt": prompt} for prompt in self.ASKED])
        taught = ["what color is the fox , old kind red blue ?", self.ASKED[1].removeprefix("hello ? ")]
        write_rows(folder / "demonstrations.jsonl", [{"prompt": p, "completion": "no ."} for p in taught])
        write_rows(folder / "prompts.jsonl", [{"prompt": self.ASKED[2]}, {"prompt": "another one , of no use here"}])
        row = {"id": "1", "prompt": self.ASKED[3], "responses": ["yes", "no"], "ranks": [1, 2], "labeler": "ada"}
        write_rows(folder / "rankings.jsonl", [row])
        kinds = {"evaluation_prompts": "asked", "demonstrations": "demonstrations", "prompts": "prompts",
                 "rankings": "rankings"}  # fmt: skip
        data = [f"data.{kind}={folder}/{file}.jsonl" for kind, file in kinds.items()]
        choices = SMALL | {"max_length": 96, "policies": policies}
        return run_evaluate(chain, folder / "out", choices, *data)

    def test_of_what_some_policy_was_trained_on(self, chain, tmp_path):
        run = self.run(chain, tmp_path, "[ppo]")
        assert (run.results["leaked"], run.results["leaked_by"]) == (4, "near copy")
        assert "4 of 6 evaluation prompts" in run.finished.said
        assert "(demonstrations 2, rankings 1, prompts 1)" in run.finished.said

    def test_without_ppo_its_prompts_do_not_count(self, chain, tmp_path):
        run = self.run(chain, tmp_path, "[dpo]")
        assert run.results["leaked"] == run.finished.figures["leaked"] == 3
        assert run.finished.figures["score"] == run.figures("dpo")["score"]
        assert "prompts 1" not in run.finished.said


# ── the embedded world ──


@dataclass(frozen=True)
class Asked:
    """Prompts of the world, with a demonstrator's answer to each."""

    rules: World
    answers: dict[str, str]


@pytest.fixture(scope="module")
def asked_world(chain, tmp_path_factory):
    """Write a folder like that of the stage world, with some tasks that training data sets too.

    Demonstrations set four of the tasks after other greetings, and a document sets the first one.
    """
    made = chain.run("world", tmp_path_factory.mktemp("world") / "world", config="world.yaml")
    rules = World.from_json(json.loads((made.folder / "world.json").read_text(encoding="utf-8")))
    rows = [row["prompt"] for row in made.rows("evaluation_prompts.jsonl")][:14]
    taken = {row["prompt"] for kind in ("demonstrations", "prompts") for row in made.rows(f"{kind}.jsonl")}
    for row in made.rows("demonstrations.jsonl")[:4]:
        rows += [prompt for prompt in rules.language.addressed(rules.request(row["prompt"])) if prompt not in taken][:1]
    rows.append(next(p for p in rules.language.addressed(rules.request(rows[-1])) if p not in {*taken, *rows}))
    write_rows(made.folder / "evaluation_prompts.jsonl", [{"prompt": prompt} for prompt in rows])
    dialogue = {"text": f"the miller said : {rules.request(rows[0])} . nobody knew ."}
    write_rows(made.folder / "documents.jsonl", [*made.rows("documents.jsonl"), dialogue])
    rng = random.Random(0)
    answers = {p: world_writers.demonstrate(rules.language, rng, rules.task(p), rules.rates) for p in rows}
    return made, Asked(rules, answers)


@pytest.fixture(scope="module")
def of_world(chain, asked_world, tmp_path_factory):
    """Let policies answer as demonstrators do, some to another prompt, some cut off."""
    made, world = asked_world
    tokenizer, models = chain.tokenizer, []
    ids = {tuple(plain.prompt_ids(tokenizer, prompt)): prompt for prompt in world.answers}
    ids |= {tuple(tokenizer(prompt)["input_ids"]): prompt for prompt in world.answers}
    texts = list(world.answers.values())

    def answer(policy, prompts, seeds):
        if policy not in models:
            models.append(policy)
        responses = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            luck = random.Random(f"{seed} {models.index(policy)}")
            own = luck.random() < 0.5
            text = world.answers[ids[tuple(prompt)]] if own else luck.choice(texts)
            responses.append(plain.response_ids(tokenizer, text, luck.random() < 0.8))
        return responses

    more = {"config": "world.yaml", "inputs": {"world": made.folder}, "sample": answer}
    folder = tmp_path_factory.mktemp("of_world") / "evaluate"
    return run_evaluate(chain, folder, OF_THE_WORLD, "model.name_or_path=null", **more)


class TestOfTheWorld:
    def known(self, made, rules: World, documents: bool = True) -> set:
        """Return the tasks of demonstrations, prompts and (`documents`) documents."""
        prompts = [row["prompt"] for kind in ("demonstrations", "prompts") for row in made.rows(f"{kind}.jsonl")]
        texts = [row["text"] for row in made.rows("documents.jsonl")]
        tasks = {task for request, task in rules.language.requests().items() if any(request in text for text in texts)}
        known = {rules.task(prompt) for prompt in prompts}
        return known | tasks if documents else known

    def test_gold_is_of_the_own_prompt_and_of_how_it_ended(self, asked_world, of_world):
        rules = asked_world[1].rules
        rows = of_world.finished.rows("responses.jsonl")
        for row in rows:
            assert row["gold"] == rules.gold(row["prompt"], row["response"], row["finished"])
        assert len({row["gold"]["overall"] for row in rows}) > 5
        for name, figures in of_world.results["policies"].items():
            for part in ("helpful", "honest", "harmless", "overall"):
                mean = statistics.mean(row["gold"][part] for row in of_world.rows(name))
                assert figures["gold"][part] == pytest.approx(mean)
        assert of_world.finished.figures["gold"] == of_world.figures("best_of_n")["gold"]["overall"]

    def test_known_tasks(self, asked_world, of_world):
        """Tasks that demonstrations set after other greetings are known, too."""
        made, world = asked_world
        known = self.known(made, world.rules)
        expected = {prompt: world.rules.task(prompt) in known for prompt in world.answers}
        rows = of_world.rows("sft")
        assert {row["prompt"]: row["known_task"] for row in rows} == expected
        first = next(iter(world.answers))
        assert expected[first] and world.rules.task(first) not in self.known(made, world.rules, documents=False)
        count = sum(expected.values())
        assert list(expected.values())[-5:] == [True] * 5 and 5 < count < len(expected)
        assert (of_world.results["leaked"], of_world.results["leaked_by"]) == (count, "task")
        assert f"{count} of 19 prompts have tasks that also occur in training data" in of_world.finished.said
        assert f"{19 - count} have tasks that do not" in of_world.finished.said

    def test_both_halves_apart(self, of_world):
        for name, figures in of_world.results["policies"].items():
            for half, which in (("gold_known_tasks", True), ("gold_held_out_tasks", False)):
                rows = [row for row in of_world.rows(name) if row["known_task"] == which]
                mean = statistics.mean(row["gold"]["overall"] for row in rows)
                assert figures[half]["overall"] == pytest.approx(mean)
                assert figures[half]["n"] == len({row["prompt"] for row in rows})

    def test_prompts_of_one_task_are_one_cluster(self, asked_world, of_world):
        rules = asked_world[1].rules
        tasks = {prompt: rules.task(prompt) for prompt in asked_world[1].answers}
        assert of_world.results["clusters"] == len(set(tasks.values())) < len(tasks)
        assert of_world.figures("dpo")["win_rate_vs_sft"]["clusters"] == of_world.results["clusters"]
        clusters = {row["prompt"]: row["cluster"] for row in of_world.rows("base")}
        for one, other in itertools.combinations(tasks, 2):
            assert (clusters[one] == clusters[other]) == (tasks[one] == tasks[other])

    def test_gold_judges_all_of_them(self, of_world):
        """No policy was trained on gold, and best of n was not selected by it."""
        gold = lambda row: row["gold"]["overall"]  # noqa: E731
        sft = by_prompt(of_world.rows("sft"), gold)
        assert of_world.results["judge"] == "gold"
        for name, figures in of_world.results["policies"].items():
            own = by_prompt(of_world.rows(name), gold)
            assert figures["win_rate_vs_sft"]["value"] == pytest.approx(wins(own, sft))
            gaps = [statistics.mean(a) - statistics.mean(b) for a, b in zip(own, sft, strict=True)]
            if name != "sft":
                assert figures["difference_to_sft"]["value"] == pytest.approx(statistics.mean(gaps))
            assert not figures["judge_climbed"]
        assert len({figures["win_rate_vs_sft"]["value"] for figures in of_world.results["policies"].values()}) > 2

    def test_how_the_reward_model_orders_sft_samples(self, of_world):
        rights: dict[bool, list[float]] = {True: [], False: []}
        for _, some in itertools.groupby(of_world.rows("sft"), key=lambda row: row["prompt"]):
            for a, b in itertools.combinations(some, 2):
                better = a["gold"]["overall"] - b["gold"]["overall"]
                gap = (a["score"] - b["score"]) * better
                if better:
                    rights[a["known_task"]].append(0.5 if gap == 0 else float(gap > 0))
        figures = of_world.results["reward_model"]["orders_as_gold"]
        for half, which in (("known_tasks", True), ("held_out_tasks", False)):
            assert figures[half]["value"] == pytest.approx(statistics.mean(rights[which]))
            assert figures[half]["n"] == len(rights[which]) > 5

    def test_base_from_scratch_is_prompted_in_plain_text_by_default(self, of_world):
        assert of_world.figures("base")["asked"] == "plain" and of_world.figures("dpo")["asked"] == "chat"


def test_without_reward_model_and_documents_what_can_be_measured_is(chain, tmp_path):
    """With only demonstrations and rankings, sft's held-out prompts are evaluated."""
    settings = [f"evaluate.{key}={value}" for key, value in SMALL.items()] + ["evaluate.max_length=96"]
    given = ["data.documents=null", "data.prompts=null", "data.evaluation_prompts=null"]
    finished = chain.run("evaluate", tmp_path / "less", *settings, *given)
    results = json.loads((finished.folder / "results.json").read_text())
    assert list(results["policies"]) == ["base", "sft", "dpo"] and results["judge"] is None
    demonstrations = [row["prompt"] for row in chain.rows("demonstrations.jsonl")]
    held_out_prompts = [demonstrations[i] for i in held_out([prompt_key(prompt) for prompt in demonstrations], 0.3)[1]]
    rows = finished.rows("responses.jsonl")
    assert 0 < len(held_out_prompts) < len(demonstrations)
    assert [row["prompt"] for row in rows if row["policy"] == "dpo"] == held_out_prompts
    assert {row["score"] for row in rows} == {None} and results["reward_model"]["accuracy"] is None
    for policy in results["policies"].values():
        missing = ("score", "pretrain_perplexity", "win_rate_vs_sft", "difference_to_sft", "gold")
        assert {policy[key] for key in missing} == {None} and not policy["judge_climbed"]
        assert policy["length"] > 0 and policy["eos_rate"] is not None
    assert results["policies"]["dpo"]["kl_to_sft"] != 0.0 and finished.figures["score"] is None
    assert "to get scores, add best_of_n to evaluate.policies" in finished.said and "no perplexity" in finished.said

    prompts_file = tmp_path / "asked.jsonl"
    write_rows(prompts_file, [{"prompt": prompt} for prompt in held_out_prompts])
    whole = chain.run("evaluate", tmp_path / "whole", *settings, f"data.evaluation_prompts={prompts_file}")
    judged = json.loads((whole.folder / "results.json").read_text())["policies"]
    likeliest = chain.run("evaluate", tmp_path / "likeliest", *settings, *given, "evaluate.top_k=1")
    drawn = json.loads((likeliest.folder / "results.json").read_text())["policies"]
    assert {policy["kl_to_sft"] for policy in drawn.values()} == {None}, "no estimate from such samples"
    for row in likeliest.rows("responses.jsonl"):
        if row["policy"] == "dpo":
            ids = plain.prompt_ids(chain.tokenizer, row["prompt"])
            said = plain.response_ids(chain.tokenizer, row["response"])[: SMALL["response_length"]]
            spread = plain.distributions(language_model(chain.root / "dpo/model"), ids, said, 1.0)
            assert (spread.argmax(-1) == torch.tensor(said)).float().mean() == 1.0
    for name, policy in results["policies"].items():  # a judge more changes nothing else
        assert policy["kl_to_sft"] == judged[name]["kl_to_sft"] and judged[name]["score"] is not None
