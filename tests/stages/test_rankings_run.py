"""Test the stage rankings by its published files, with rankings of people and simulated ones."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import second_route as plain
import torch
from micro_chain import write_rows

from data.world.labelers import LABELERS
from data.world.world import World
from pipeline.errors import UserError
from stages.rollouts.frozen import FrozenSampler

NAMES = [labeler.name for labeler in LABELERS]


def both(finished) -> tuple[list[dict], list[dict]]:
    """Return the rows of train.jsonl and of validation.jsonl."""
    return finished.rows("train.jsonl"), finished.rows("validation.jsonl")


def usable(row: dict) -> list[tuple[int, int]]:
    """Return (better, worse) of every usable pair: judged, not tied, different texts."""
    ranks, texts = row["ranks"], row["responses"]
    K = range(len(ranks))
    return [(i, j) for i in K for j in K
            if None not in (ranks[i], ranks[j]) and ranks[i] < ranks[j] and texts[i] != texts[j]]  # fmt: skip


def agreement(rows: list[dict]) -> float:
    """Return the share of pairs that two labelers of a prompt order alike; ties do not count."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    same = total = 0
    for one, other in (pair for some in by_prompt.values() for pair in itertools.combinations(some, 2)):
        for i, j in itertools.combinations(range(len(one["ranks"])), 2):
            a, b, c, d = one["ranks"][i], one["ranks"][j], other["ranks"][i], other["ranks"][j]
            if None not in (a, b, c, d) and a != b and c != d:
                same, total = same + ((a < b) == (c < d)), total + 1
    return same / total


@pytest.fixture(scope="module")
def given(chain):
    """Return the chain's rankings, a fourth of them again with other white space."""
    rows = chain.rows("rankings.jsonl")
    return rows + [
        row | {"prompt": f"  {row['prompt'].replace(' ', '  ')}", "labeler": "cleo", "id": f"{row['id']} cleo"}
        for row in rows[::4]
    ]


@pytest.fixture(scope="module")
def peoples(chain, given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rankings")
    write_rows(folder / "rankings.jsonl", given)
    settings = (f"data.rankings={folder}/rankings.jsonl", "rankings.validation_fraction=0.3")
    return chain.run("rankings", folder / "out", *settings)


class TestOfPeople:
    def test_all_rows_of_a_prompt_are_on_one_side(self, given, peoples):
        """Prompts whose hash is below 0.3 are held out, whatever its white space."""
        train, held_out = both(peoples)
        key = lambda row: " ".join(row["prompt"].split())  # noqa: E731
        assert {row["id"] for row in held_out} == {
            row["id"] for row in given if plain.prompt_hash_fraction(row["prompt"]) < 0.3
        }
        assert not {key(row) for row in train} & {key(row) for row in held_out}
        assert len(held_out) > len({key(row) for row in held_out}), "a prompt with two rows is among them"

    def test_nothing_is_lost_or_changed(self, given, peoples):
        train, held_out = both(peoples)
        published = {row["id"]: row for row in train + held_out}
        assert len(published) == len(train) + len(held_out) == len(given)
        for row in given:
            assert row.items() <= published[row["id"]].items()

    def test_the_figures(self, given, peoples):
        train, held_out = both(peoples)
        figures = peoples.figures
        assert (figures["rankings"], figures["train"]) == (len(given), len(train))
        assert figures["validation"] == len(held_out)
        assert figures["pairs"] == sum(len(usable(row)) for row in given)
        assert figures["labeler_agreement"] == pytest.approx(agreement(held_out))
        assert agreement(held_out) != agreement(given)

    def test_bad_rows_that_are_dropped_are_listed_beside_the_rankings(self, chain, given, tmp_path):
        file = tmp_path / "rankings.jsonl"
        write_rows(file, [*given[:20], given[20] | {"ranks": [7] * 9}, *given[21:], {"prompt": "red"}])
        source = f"{{path: {file}, on_bad_row: drop, max_bad: 0.2}}"
        settings = (f"data.rankings={source}", "rankings.validation_fraction=0.3")
        done = chain.run("rankings", tmp_path / "out", *settings)
        rows = [json.loads(line) for line in (done.folder / "left_out.jsonl").read_text().splitlines()]
        assert [(row["data"], row["file"], row["line"]) for row in rows] == [
            ("rankings", str(file), 21),
            ("rankings", str(file), len(given) + 1),
        ]
        assert "9 ranks" in rows[0]["reason"] and done.figures["bad_rows"] == 2
        assert "rankings: 2 bad rows dropped (1: " in done.said
        assert len(both(done)[0]) + len(both(done)[1]) == len(given) - 1

    def test_nothing_more_is_said_or_written_where_all_rows_are_taken(self, peoples):
        assert not (peoples.folder / "left_out.jsonl").exists() and "bad_rows" not in peoples.figures
        assert "prompts are too few to keep some for a judge" in peoples.said and peoples.said.count("\n") == 0


def many(labelers: int, prompts: int = 700) -> list[dict]:
    """Return rankings of many prompts, each by one of some labelers."""
    return [{"id": str(i), "prompt": f"what color is fox {i} ?", "responses": ["red .", "blue .", "no ."],
             "ranks": [1, 2, 3], "labeler": f"person {i % labelers}"} for i in range(prompts)]  # fmt: skip


class TestKept:
    """Check the rankings that are kept for a judge."""

    def run(self, chain, folder, rows, *settings):
        write_rows(folder / "rankings.jsonl", rows)
        return chain.run("rankings", folder / "out", f"data.rankings={folder}/rankings.jsonl", *settings)

    def test_by_default_a_fifth_of_many_where_a_policy_climbs(self, chain, tmp_path):
        finished = self.run(chain, tmp_path, many(1))
        sides = {name: finished.rows(f"{name}.jsonl") for name in ("train", "validation", "judge")}
        prompts = {name: {row["prompt"] for row in rows} for name, rows in sides.items()}
        for name, other in itertools.combinations(sides, 2):
            assert not prompts[name] & prompts[other]
        assert sum(len(rows) for rows in sides.values()) == 700 and 0.15 < len(sides["judge"]) / 700 < 0.25
        assert {name: finished.figures[name] for name in sides} == {name: len(rows) for name, rows in sides.items()}
        assert "are kept to train a judge; by prompt" in finished.said
        assert finished.figures["judge_labelers_apart"] is False

    def test_validation_is_the_same_without_a_judge(self, chain, tmp_path):
        kept = self.run(chain, tmp_path / "kept", many(1))
        none = self.run(chain, tmp_path / "none", many(1), "rankings.judge_fraction=0")
        assert not (none.folder / "judge.jsonl").exists() and none.said == "" and "judge" not in none.figures
        assert none.rows("validation.jsonl") == kept.rows("validation.jsonl")
        assert len(none.rows("train.jsonl")) == len(kept.rows("train.jsonl") + kept.rows("judge.jsonl"))

    def test_by_labelers_who_train_nothing_else(self, chain, tmp_path):
        finished = self.run(chain, tmp_path, many(14))
        own, others = ({row["labeler"] for row in finished.rows(f"{name}.jsonl")} for name in ("judge", "train"))
        assert not own & others and len(own) >= 2 and finished.figures["judge_labelers_apart"] is True
        assert "labelers, who train nothing else" in finished.said

    def test_of_few_none_are_kept_unless_it_is_asked_for(self, chain, tmp_path):
        finished = self.run(chain, tmp_path / "few", many(3, prompts=60))
        assert not (finished.folder / "judge.jsonl").exists() and "warning: 60 prompts are too few" in finished.said
        asked = self.run(chain, tmp_path / "asked", many(3, prompts=60), "rankings.judge_fraction=0.3")
        assert len(asked.rows("judge.jsonl")) > 5 and "too few" not in asked.said

    def test_without_a_policy_that_climbs_none_are_kept(self, chain, tmp_path):
        finished = self.run(chain, tmp_path, many(3), "evaluate.policies=[sft, dpo]")
        assert not (finished.folder / "judge.jsonl").exists() and finished.said == ""

    def test_a_judge_without_a_usable_pair_is_refused(self, chain, tmp_path):
        rows = [row | {"ranks": [1, 1, 1]} for row in many(1, prompts=60)]
        rows += [row | {"id": f"{row['id']} again", "prompt": f"once more {row['id']}"} for row in many(1, prompts=60)]
        free = [row for row in rows if 0.1 < plain.prompt_hash_fraction(row["prompt"]) <= 0.12]
        rows = [row | {"ranks": [1, 1, 1]} if row in free else row for row in rows]
        with pytest.raises(UserError, match=r"the judge split .* change rankings.judge_fraction"):
            self.run(chain, tmp_path, rows, "rankings.judge_fraction=0.02")

    def test_shares_that_leave_nothing_to_train_on(self, chain):
        with pytest.raises(UserError, match=r"rankings.judge_fraction: 0.95 and validation_fraction 0.1 leave nothing"):
            chain.experiment("rankings.judge_fraction=0.95", "rankings.validation_fraction=0.1")


K = 5
SEED = 5  # of micro_chain.py


def answers(prompts: list[str], completions: list[str]) -> dict[str, list[tuple[str, bool]]]:
    """Return five responses (text, whether it ended with EOS) for each prompt.

    They are a demonstrator's response, a response to another prompt, the first one cut off, the
    first one with an insult, and one to a third prompt (for each third prompt, the second one
    again).
    """
    responses = {}
    for i, prompt in enumerate(prompts):
        own, other, third = (completions[(i + n) % len(prompts)] for n in (0, 1, 2))
        last = other if i % 3 == 0 else third
        texts = [(own, True), (other, True), (f"{own} the", False), (f"{own} you are an idiot .", True), (last, True)]
        responses[prompt] = texts
    return responses


@pytest.fixture(scope="module")
def world(chain):
    """Return a folder as of the stage world whose prompts are those of its demonstrations."""
    chain.run("world", chain.root / "world", config="world.yaml")
    rows = chain.rows("world/demonstrations.jsonl")
    write_rows(chain.root / "asked" / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    text = (chain.root / "world/world.json").read_text(encoding="utf-8")
    (chain.root / "asked/world.json").write_text(text, encoding="utf-8")
    return SimpleNamespace(
        folder=chain.root / "asked",
        rules=World.from_json(json.loads(text)),
        answers=answers([row["prompt"] for row in rows], [row["completion"] for row in rows]),
    )


def simulate(chain, world, folder, monkeypatch, **settings):
    """Run the stage on the world's prompts with `world.answers` in place of sampled responses."""
    ids = {tuple(plain.prompt_ids(chain.tokenizer, prompt)): prompt for prompt in world.answers}

    def answer(sampler, policy, model, request, batch_size, poll):
        remaining = {prompt: iter(texts) for prompt, texts in world.answers.items()}
        chosen = [next(remaining[ids[tuple(prompt)]]) for prompt in request.prompts]
        return [plain.response_ids(chain.tokenizer, text, finished) for text, finished in chosen]

    monkeypatch.setattr(FrozenSampler, "sample", answer)
    small = {"samples_per_prompt": K, "max_length": 96, "response_length": 8, "batch_size": 7,
             "validation_fraction": 0.3}  # fmt: skip
    overrides = [f"rankings.{key}={x}" for key, x in (small | settings).items()]
    return chain.run("rankings", folder, *overrides, config="world.yaml", inputs={"world": world.folder})


def utilities(world, row: dict) -> list[float]:
    """Return the row's labeler's utility of each of its responses."""
    finished = [dict(world.answers[row["prompt"]])[text] for text in row["responses"]]
    every = world.rules.labeler_utilities(row["prompt"], row["responses"], finished)
    return every[NAMES.index(row["labeler"])].tolist()


def simulated(chain, world, tmp_path_factory, name, **settings):
    """Run `simulate` for a fixture, in a folder of that name."""
    with pytest.MonkeyPatch.context() as patch:
        return simulate(chain, world, tmp_path_factory.mktemp(name) / "rankings", patch, **settings)


@pytest.fixture(scope="module")
def calm(chain, world, tmp_path_factory):
    """Run with an agreement out of reach, so without noise; three labelers per training prompt."""
    return simulated(chain, world, tmp_path_factory, "calm", agreement=0.999, labelers_per_prompt=3)


@pytest.fixture(scope="module")
def noisy(chain, world, tmp_path_factory):
    """Run with noise that gives a plausible agreement."""
    return simulated(chain, world, tmp_path_factory, "noisy", agreement=0.62)


@pytest.fixture(scope="module")
def blind(chain, world, tmp_path_factory):
    """Run with hardly anything but noise."""
    return simulated(chain, world, tmp_path_factory, "blind", agreement=0.501, labelers_per_prompt=2)


@pytest.fixture(scope="module")
def unfinished(chain, world, tmp_path_factory):
    """Run with labelers who do not rank what was cut off."""
    return simulated(chain, world, tmp_path_factory, "unfinished", agreement=0.62, rank_unfinished="false")


def request(world, prompt: str) -> str:
    """Return the longest request of the world in a prompt, which is the prompt without greeting."""
    return max((text for text in world.rules.language.requests() if text in prompt), key=len)


class TestSimulated:
    def test_every_prompt_is_ranked_with_all_its_responses(self, world, calm):
        train, held_out = both(calm)
        assert {row["prompt"] for row in train + held_out} == set(world.answers)
        fractions = {p: plain.hash_fraction(f"{SEED} {request(world, p)}") for p in world.answers}
        assert {row["prompt"] for row in held_out} == {p for p, fraction in fractions.items() if fraction < 0.3}
        # the same question after another greeting is in the same split
        requests = [{request(world, row["prompt"]) for row in rows} for rows in (train, held_out)]
        assert not requests[0] & requests[1]
        for row in train + held_out:
            assert row["responses"] == [text for text, _ in world.answers[row["prompt"]]]
        assert len({row["id"] for row in train + held_out}) == len(train + held_out)

    def test_who_ranks(self, world, calm, noisy):
        """A training prompt has as many labelers as the setting says, a held-out one has two.

        They are different ones, and each of the five labelers occurs.
        """
        for finished, labelers in ((calm, 3), (noisy, 1)):
            for rows, count in zip(both(finished), (labelers, 2), strict=True):
                by_prompt: dict[str, list[str]] = {}
                for row in rows:
                    by_prompt.setdefault(row["prompt"], []).append(row["labeler"])
                assert all(len(names) == len(set(names)) == count for names in by_prompt.values())
                assert {name for names in by_prompt.values() for name in names} == set(NAMES)

    def test_without_noise_ranks_are_the_labelers_taste(self, world, calm):
        """Ranks follow the utilities of the row's labeler, and equal texts get equal ranks."""
        assert "without noise" in calm.said
        decided = by_gold = 0
        for row in itertools.chain(*both(calm)):
            worth, texts = utilities(world, row), row["responses"]
            if row["labeler"] == "ada":  # gold itself
                finished = [flag for _, flag in world.answers[row["prompt"]]]
                gold = [world.rules.gold(row["prompt"], text, flag)["overall"]
                        for text, flag in zip(texts, finished, strict=True)]  # fmt: skip
                assert worth == pytest.approx(gold)
                by_gold += 1
            for i, j in itertools.permutations(range(K), 2):
                if texts[i] == texts[j]:
                    assert row["ranks"][i] == row["ranks"][j]
                elif worth[i] > worth[j] + 3e-3:  # more than the remaining noise
                    assert row["ranks"][i] < row["ranks"][j], row
                    decided += 1
        assert decided > 500 and by_gold > 5

    def test_with_noise_a_pair_is_decided_with_the_probability_of_its_utilities(self, world, noisy):
        """It is the logistic function of their difference over the noise, within chance."""
        noise, kept, expected, variance = noisy.figures["noise"], 0, 0.0, 0.0
        for row in itertools.chain(*both(noisy)):
            worth, texts = utilities(world, row), row["responses"]
            for i, j in itertools.permutations(range(K), 2):
                if worth[i] > worth[j] and texts[i] != texts[j]:
                    p = 1 / (1 + math.exp((worth[j] - worth[i]) / noise))
                    kept += row["ranks"][i] < row["ranks"][j]
                    expected, variance = expected + p, variance + p * (1 - p)
        assert abs(kept - expected) < 4 * math.sqrt(variance) < 0.2 * expected

    def test_the_noise_of_prompts_and_labelers_is_independent(self, blind):
        """A labeler's rankings differ between prompts, and two labelers' differ on one prompt."""
        train, _ = both(blind)
        for name in NAMES:
            own = [tuple(row["ranks"]) for row in train if row["labeler"] == name and len(set(row["responses"])) == K]
            assert len(set(own)) > 0.6 * len(own) > 4
        assert abs(agreement(train) - 0.5) < 0.12

    def test_the_noise_gives_the_requested_agreement(self, world, noisy):
        """The expected agreement is over all pairs of different texts and of the five labelers."""
        agree = []
        for prompt, responses in world.answers.items():
            texts, finished = (list(part) for part in zip(*responses, strict=True))
            worth = world.rules.labeler_utilities(prompt, texts, finished)
            for i, j in itertools.combinations(range(K), 2):
                if texts[i] != texts[j]:
                    p = [1 / (1 + math.exp((u[j] - u[i]) / noisy.figures["noise"])) for u in worth.tolist()]
                    agree += [a * b + (1 - a) * (1 - b) for a, b in itertools.combinations(p, 2)]
        assert statistics.mean(agree) == pytest.approx(0.62, abs=1e-3)
        assert noisy.figures["expected_agreement"] == pytest.approx(0.62, abs=1e-3)

    def test_the_figures_are_of_the_published_rows(self, world, noisy):
        train, held_out = both(noisy)
        figures = noisy.figures
        assert (figures["train"], figures["validation"]) == (len(train), len(held_out))
        assert figures["rankings"] == len(train + held_out)
        assert figures["pairs"] == sum(len(usable(row)) for row in train + held_out)
        assert figures["labeler_agreement"] == pytest.approx(agreement(held_out))
        assert figures["unfinished"] == pytest.approx(1 / K) and "20% of the responses were cut off" in noisy.said

    def test_what_was_cut_off_can_stay_unjudged(self, world, unfinished):
        """Nobody ranks it, and it counts neither in the agreement nor in the ceiling."""
        rows = list(itertools.chain(*both(unfinished)))
        assert any(not all(row["finished"]) for row in rows)
        for row in rows:
            assert [rank is None for rank in row["ranks"]] == [not ended for ended in row["finished"]]
            assert min(rank for rank in row["ranks"] if rank is not None) == 1
        agree = []
        for prompt, responses in world.answers.items():
            texts, finished = (list(part) for part in zip(*responses, strict=True))
            worth = world.rules.labeler_utilities(prompt, texts, finished)
            for i, j in itertools.combinations(range(K), 2):
                if texts[i] != texts[j] and finished[i] and finished[j]:
                    p = [1 / (1 + math.exp((u[j] - u[i]) / unfinished.figures["noise"])) for u in worth.tolist()]
                    agree += [a * b + (1 - a) * (1 - b) for a, b in itertools.combinations(p, 2)]
        assert statistics.mean(agree) == pytest.approx(0.62, abs=1e-3)
        assert unfinished.figures["expected_agreement"] == pytest.approx(0.62, abs=1e-3)
        assert 0.5 < unfinished.figures["accuracy_ceiling"] < 1

    def test_the_ceiling_is_of_a_scorer_that_knows_all_utilities_but_not_the_labeler(self, world, noisy):
        """It is measured on the held-out rows."""
        noise, hits, expected_hits = noisy.figures["noise"], [], []
        for row in both(noisy)[1]:
            finished = [flag for _, flag in world.answers[row["prompt"]]]
            worth = world.rules.labeler_utilities(row["prompt"], row["responses"], finished).tolist()
            for i, j in usable(row):
                p = statistics.mean(1 / (1 + math.exp((u[j] - u[i]) / noise)) for u in worth)
                hits.append(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0)
                expected_hits.append(max(p, 1 - p))
        assert noisy.figures["accuracy_ceiling"] == pytest.approx(statistics.mean(hits))
        assert noisy.figures["expected_accuracy_ceiling"] == pytest.approx(statistics.mean(expected_hits))


def test_a_judge_in_the_world_gets_further_prompts_and_changes_nothing_else(chain, world, noisy, monkeypatch, tmp_path):
    """Training has what it has without a judge, which asks none of validation's requests."""
    own = plain.prompt_ids
    ids = {tuple(own(chain.tokenizer, prompt)): prompt for prompt in world.answers}

    def answer(sampler, name, policy, request, batch_size, poll):
        remaining = {prompt: iter(texts) for prompt, texts in world.answers.items()}
        responses = []
        for prompt in request.prompts:
            known = ids.get(tuple(prompt))
            text = next(remaining[known]) if known else (f"the fox is {len(responses)} .", True)
            responses.append(plain.response_ids(chain.tokenizer, *text))
        return responses

    monkeypatch.setattr(FrozenSampler, "sample", answer)
    small = {"samples_per_prompt": K, "max_length": 96, "response_length": 8, "batch_size": 7,
             "validation_fraction": 0.3, "agreement": 0.62, "judge_fraction": 0.5}  # fmt: skip
    overrides = [f"rankings.{key}={x}" for key, x in small.items()]
    options = {"config": "world.yaml", "inputs": {"world": world.folder}}
    finished = chain.run("rankings", tmp_path / "out", *overrides, **options)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (finished.folder / name).read_bytes() == (noisy.folder / name).read_bytes()
    rows = finished.rows("judge.jsonl")
    assert len(rows) == round(0.5 * len(world.answers)) == finished.figures["judge"]
    prompts = {row["prompt"] for row in rows}
    made = {row["prompt"] for kind in ("demonstrations", "prompts", "evaluation_prompts")
            for row in chain.rows(f"world/{kind}.jsonl")}  # fmt: skip
    assert len(prompts) == len(rows) and not prompts & made
    asked = lambda some: {world.rules.request(row["prompt"]) for row in some}  # noqa: E731
    assert not asked(rows) & asked(finished.rows("validation.jsonl"))
    held_out = {task for rows_of_kind in world.rules.shares.held_out.values() for _, task in rows_of_kind}
    assert not held_out & {world.rules.task(prompt) for prompt in prompts}
    assert {row["labeler"] for row in rows} == set(NAMES) and len({row["id"] for row in rows}) == len(rows)


def test_the_ranked_responses_are_sft_samples_at_the_requested_temperature(chain, world, tmp_path):
    """Their log-probabilities are those of softmax(logits / 0.6) by transformers, within chance.

    Prompts without room for a response are dropped.
    """
    choices = {"samples_per_prompt": 4, "response_length": 6, "max_length": 60, "num_prompts": 30, "batch_size": 8,
               "on_too_long": "drop", "temperature": 0.6}  # fmt: skip
    settings = [f"rankings.{key}={x}" for key, x in choices.items()]
    options = {"config": "world.yaml", "inputs": {"world": world.folder}}
    finished = chain.run("rankings", tmp_path / "rankings", *settings, **options)
    rows = {row["prompt"]: row for row in itertools.chain(*both(finished))}
    lengths = {prompt: len(plain.prompt_ids(chain.tokenizer, prompt)) for prompt in world.answers}
    assert 10 < len(rows) < 30 and max(lengths[prompt] for prompt in rows) <= 54 < max(lengths.values())
    model, surprise, variance, cut = plain.language_model(chain.root / "sft/model"), 0.0, 0.0, []
    for prompt, row in rows.items():
        assert len(row["responses"]) == 4
        for text in row["responses"]:
            ids = plain.response_ids(chain.tokenizer, text)
            cut.append(len(ids) > 6)
            with torch.no_grad():
                spread = plain.distributions(model, plain.prompt_ids(chain.tokenizer, prompt), ids[:6], 0.6)
            logps = spread[torch.arange(len(ids[:6])), torch.tensor(ids[:6])]
            entropy = -(spread.exp() * spread).sum(-1)
            surprise += (logps + entropy).sum().item()

            variance += ((spread.exp() * spread.clamp(min=-1e4) ** 2).sum(-1) - entropy**2).sum().item()
    assert abs(surprise) < 3 * math.sqrt(variance)
    assert finished.figures["unfinished"] == pytest.approx(statistics.mean(cut)) and 0 < statistics.mean(cut) < 1
    assert statistics.mean(len(set(row["responses"])) for row in rows.values()) > 3


def test_the_ranked_responses_are_of_the_likeliest_tokens(chain, world, tmp_path):
    """With top-k 3 no token is outside the three likeliest of its place; some are not the first."""
    choices = {"samples_per_prompt": 3, "response_length": 6, "max_length": 96, "num_prompts": 10, "top_k": 3}
    settings = [f"rankings.{key}={x}" for key, x in choices.items()]
    finished = chain.run(
        "rankings", tmp_path / "rankings", *settings, config="world.yaml", inputs={"world": world.folder}
    )
    model, places = plain.language_model(chain.root / "sft/model"), []
    for row in itertools.chain(*both(finished)):
        for text in row["responses"]:
            ids = plain.response_ids(chain.tokenizer, text)[:6]
            with torch.no_grad():
                spread = plain.distributions(model, plain.prompt_ids(chain.tokenizer, row["prompt"]), ids, 1.0)
            own = spread[torch.arange(len(ids)), torch.tensor(ids)]
            places += (spread > own.unsqueeze(-1)).sum(-1).tolist()
    assert set(places) == {0, 1, 2}
