"""Check the parts of the page: the experiment, trust in the score, samples, and what is left out.

Also check that everybody can read it, on paper and by keyboard too.
"""

import copy
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_run import GIT, HOSTILE, TRUST, fake_run, page_of, without_a_judge, write_rows
from rich.console import Console

from stages import report
from stages.page import glossary as report_glossary
from stages.page import results as report_results
from stages.page import results_tables, trust
from stages.page import samples as report_samples
from stages.page import terminal as report_terminal
from stages.page.data_table import data_table
from stages.page.experiment import facts
from stages.page.results import NAMES, complete
from stages.page.settings_table import settings_table
from stages.settings.changed import defaults_of

FACE = ("base", "sft", "dpo")


class Page(HTMLParser):
    """Parse a page: tags with attributes, headings in order, and all text except the style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.headings, self.text, self.inside = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.inside.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text += data


def results_of(ctx) -> dict:
    """Return results.json."""
    return json.loads((ctx.inputs["evaluate"] / "results.json").read_text())


def write_results(ctx, results: dict) -> None:
    """Replace results.json."""
    (ctx.inputs["evaluate"] / "results.json").write_text(json.dumps(results))


def sentences_of(ctx) -> list[str]:
    """Return the sentences of the checks that need no gold."""
    return trust.sentences(complete(results_of(ctx)), NAMES | {"best_of_n": "best of 16"})


# -- the experiment --------------------------------------------------------------------------------


class TestExperiment:
    def test_the_first_questions_are_answered_from_the_manifests(self, tmp_path):
        page = Page(page_of(fake_run(tmp_path, gold=False, world=False))).text
        top = page[: page.index("Settings that differ")]
        for said in (
            "org/small", f"commit {'9' * 40} (requested: main)", "135.0M parameters",  # base model
            "adapter lora: r 8, lora_alpha 32, target_modules all-linear",
            "2 × NVIDIA H200 (150.1 GB)", "Some CPU", "16 cores", "1 process of 2 threads",
            "4 min 47 s in total", "ppo 41 s",  # seven stages of 41 s
            "rlhf run report -c mine.yaml ppo.kl_coef=0.1", f"git {GIT}", "torch 2.13.0",
            "demonstrations.jsonl", "rankings.jsonl", "evaluation_prompts.jsonl", "1,234",
        ):  # fmt: skip
            assert said in top, said
        assert page.index("The experiment") < page.index("On 40 prompts") and "/home/me" not in page

    def test_a_model_from_scratch_and_all_weights(self, tmp_path):
        ctx = fake_run(tmp_path)
        for manifest in ctx.manifests.values():
            manifest["config"] = {
                **manifest["config"],
                "model": {"name_or_path": None, "hidden_size": 96, "peft": None},
            }
        page = Page(page_of(ctx)).text
        assert "trained from scratch" in page and "width 96" in page and "all weights, no adapter" in page
        assert "Adapter" not in page[page.index("Glossary") :]

    def test_data_of_the_world_shows_the_rows_that_world_wrote(self, tmp_path):
        ctx = fake_run(tmp_path)
        table = data_table(ctx.manifests, results_of(ctx))
        rows = {row[0].text: [cell.text for cell in row] for row in table.rows}
        assert rows["demonstrations"][1:4] == ["demonstrations.jsonl", "3,000", "sft, rm"]
        assert rows["documents"][1:3] == ["documents.jsonl", "15,000"]
        assert rows["rankings"][1] == "train.jsonl, validation.jsonl"

    def test_data_from_the_hub_shows_commit_and_split(self, tmp_path):
        ctx = fake_run(tmp_path, world=False, gold=False)
        hub = {"path": "org/set", "revision": "abcdef0123", "asked_revision": None, "split": "test", "limit": 500}
        ctx.manifests["sft"]["config"]["data"] = {"demonstrations": hub}
        table = data_table(ctx.manifests, results_of(ctx))
        row = next(row for row in table.rows if row[0].text == "demonstrations")
        assert (row[1].text, row[1].small) == ("org/set", "split test, commit abcdef0, at most 500 rows")
        assert row[2].text == "95 used"  # rows on the Hub are not counted before they are read: sft's own figure

    def test_part_of_a_file_shows_rows_read_and_rows_in_the_file(self, tmp_path):
        ctx = fake_run(tmp_path, world=False, gold=False)
        for skip, limit, rows in ((1000, 500, 234), (0, 500, 500), (2000, None, 0)):
            source = {"path": "/d/some.jsonl", "rows": 1234, "skip": skip, "limit": limit}
            ctx.manifests["sft"]["config"]["data"] = {"demonstrations": source}
            table = data_table(ctx.manifests, results_of(ctx))
            row = next(row for row in table.rows if row[0].text == "demonstrations")
            assert (row[2].text, row[2].small) == (str(rows), "of 1,234 in the file")

    def test_a_mixture_shows_its_parts_and_how_they_were_read(self, tmp_path):
        ctx = fake_run(tmp_path, world=False, gold=False)
        parts = {
            "1": {"path": "/d/some.jsonl", "rows": 1000, "limit": 10, "weight": 0.5},
            "2": {"path": "/d/more.jsonl", "rows": 234, "columns": {"prompt": "q"}, "tie_within": 0.5},
        }
        mixture = {"path": "/d/some.jsonl + /d/more.jsonl", "parts": parts}
        ctx.manifests["sft"]["config"]["data"] = {"demonstrations": mixture}
        row = next(row for row in data_table(ctx.manifests, results_of(ctx)).rows if row[0].text == "demonstrations")
        assert row[1].text == "some.jsonl + more.jsonl"
        assert row[1].small == (
            "some.jsonl: at most 10 rows, weight 0.5; more.jsonl: columns prompt: q, scores within 0.5 tied"
        )
        assert (row[2].text, row[2].small) == ("95 used", "of 1,234 in the files")
        ctx.manifests["sft"]["metrics"] |= {"left_out": 40, "bad_rows": 1}
        parts["1"]["path"] = "/d/many/*.jsonl"
        row = next(row for row in data_table(ctx.manifests, results_of(ctx)).rows if row[0].text == "demonstrations")
        assert row[1].text == "many/*.jsonl + more.jsonl", "a glob shows its folder"
        assert row[2].small == "of 1,234 in the files; 40 left out; 1 with mistakes dropped"

    def test_every_setting_that_differs_is_listed_and_no_other(self, tmp_path):
        ctx = fake_run(tmp_path)
        table = settings_table(ctx.manifests, defaults_of(type(ctx.experiment)))
        rows = {row[0].text: (row[1].text, row[1].small, row[2].text) for row in table.rows}
        assert rows.pop("sft.learning_rate") == ("0.0002", "", "2e-05")
        assert rows.pop("sft.num_train_epochs")[0] == "3.0"
        assert rows.pop("ppo.kl_coef") == ("0.1", "changed during the run: 0.05 → 0.1", "0.05")
        assert rows.pop("model.name_or_path") == ("org/small", "", "null")
        assert rows.pop("checkpoints.every") == ("25", "", "null")
        assert {key for key in rows if not key.startswith("model.")} == set()  # ppo.gamma is 1.0 by default
        assert {key: value[0] for key, value in rows.items() if "peft" in key} == {"model.peft.r": "8"}
        assert not table.folded and "default</th>" in page_of(ctx)

    def test_an_optional_section_is_listed_even_with_default_values(self, tmp_path):
        ctx = fake_run(tmp_path)
        ctx.manifests["sft"]["config"]["model"] = {"peft": {"method": "lora", "r": 16, "bits": None}}
        ctx.manifests["sft"]["config"]["sft"] = {"ppo_init": {"num_train_epochs": 2.0}, "learning_rate": 0.1}
        table = settings_table(ctx.manifests, defaults_of(type(ctx.experiment)))
        rows = [(row[0].text, row[1].text, row[1].small, row[2].text) for row in table.rows]
        assert ("model.peft", "{}", "", "null") in rows and ("sft.ppo_init", "{}", "", "null") in rows

    def test_many_settings_are_folded(self, tmp_path):
        ctx = fake_run(tmp_path)
        ctx.manifests["dpo"]["config"]["dpo"] = {f"key_{i}": i for i in range(20)}
        assert re.search(r"<summary>Settings that differ from their default: \d+</summary>", page_of(ctx))

    def test_where_stages_ran_differently_each_is_named(self, tmp_path):
        ctx = fake_run(tmp_path)
        ctx.manifests["ppo"] |= {"command": "rlhf run ppo -c other.yaml", "hardware": None, "device": None}
        ctx.manifests["ppo"]["config"] = {**ctx.manifests["ppo"]["config"], "launch": {"processes": 4}}
        answers = dict(facts(ctx.manifests))
        assert answers["Command"][1] == "rlhf run ppo -c other.yaml (ppo)"
        assert "(world, base, sft, rankings, rm, dpo, evaluate)" in answers["Command"][0]
        assert answers["Hardware"][1] == "1 process of 2 threads (ppo)"
        table = settings_table(ctx.manifests, defaults_of(type(ctx.experiment)))
        assert any(row[0].text == "launch.processes" and row[1].text == "4" for row in table.rows)

    def test_manifests_of_an_older_version(self, tmp_path):
        ctx = fake_run(tmp_path)
        for manifest in ctx.manifests.values():
            for key in ("hardware", "device", "strategy", "command"):
                manifest.pop(key)
        page = Page(page_of(ctx)).text
        assert "1 process of 2 threads" in page and "Command" not in page


# -- what is left out ------------------------------------------------------------------------------


class TestWithoutEverything:
    def sft_and_dpo(self, tmp_path):
        """Return an experiment of SFT and DPO: no reward model, no PPO, no gold scorer."""
        ctx = fake_run(tmp_path, policies=FACE, gold=False, world=False, reward_model=False)
        without_a_judge(ctx)
        return ctx

    def test_only_sft_and_dpo_have_a_page(self, tmp_path):
        page = Page(page_of(self.sft_and_dpo(tmp_path)))
        assert "no reward model judged the responses, so read" in page.text and "judged by nobody" in page.text
        assert "KL, SFT → DPO" in page.text and "greedy dpo" in page.text
        for gone in ("pretraining perplexity", "Perplexity", "win rate", "Does the score", "reward model score", "gold",
                     "Episode"):  # fmt: skip
            assert gone not in page.text, gone
        assert {"#trust", "#ppo"} & {a.get("href") for _, a in page.tags} == set()

    def test_only_sft_and_dpo_have_a_table(self, tmp_path):
        ctx = self.sft_and_dpo(tmp_path)
        console = Console(width=100, record=True, file=io.StringIO())
        report_terminal.show(ctx.publish, console)
        text = console.export_text()
        assert "no reward model judged" in text and "length" in text
        assert "score" not in text and "reward model:" not in text

    @pytest.mark.parametrize("gold", [True, False])
    def test_any_figure_may_be_missing_or_null(self, tmp_path, gold):
        """Remove each figure, or set it to null, and make the page and the terminal table."""
        ctx = fake_run(tmp_path, gold=gold, held_out=True, prompts=9)
        whole = results_of(ctx)
        places = [("policies", n, key) for n in ("sft", "ppo") for key in report_results.POLICY if key != "gold"]
        places += [("policies", "ppo", "ci95", key) for key in report_results.INTERVALS]
        places += [("reward_model", key) for key in report_results.REWARD_MODEL]
        places += [
            (key,)
            for key in (*report_results.WHOLE, "reward_model", "overoptimisation")
            if key not in ("judge", "judge_name")
        ]
        places += [("overoptimisation", n) for n in ("sft", "ppo")]
        places += [("overoptimisation", "ppo", key) for key in report_results.CHECKS]
        for at, place in enumerate(places):
            results = copy.deepcopy(whole)
            inner = results
            for key in place[:-1]:
                inner = inner[key]
            if at % 2:
                inner[place[-1]] = None
            else:
                inner.pop(place[-1], None)
            write_results(ctx, results)
            report_terminal.show(ctx.publish, Console(file=io.StringIO()))
            assert "None" not in Page(page_of(ctx)).text.replace("None of these", ""), place

    def test_gold_is_not_mentioned_where_there_is_none(self, tmp_path):
        page = page_of(fake_run(tmp_path, gold=False, world=False))
        assert "gold" not in page.lower()
        assert "gold" in page_of(fake_run(tmp_path / "other")).lower()

    def test_only_dashed_lines_that_are_drawn_are_explained(self, tmp_path):
        ctx = fake_run(tmp_path, world=False, gold=False)
        assert "prefer the same response." in page_of(ctx)  # neither is known
        results = results_of(ctx)
        results["reward_model"]["labeler_agreement"] = 0.7
        write_results(ctx, results)
        page = page_of(ctx)
        assert "Dashed: how often two labelers agree." in page and "best possible on these" not in page

    def test_a_loss_is_not_given_as_a_share_of_the_gain(self, tmp_path):
        """Check that a loss by the held-out model gives no negative share."""
        ctx = fake_run(tmp_path, gold=False, held_out=True)
        results = results_of(ctx)
        seen = results["overoptimisation"]["ppo"]["held_out"]["difference_to_sft"]
        seen |= {"value": -0.4, "ci95": [-0.6, -0.2]}
        write_results(ctx, results)
        page = Page(page_of(ctx)).text
        assert "no clear gain, so the score may come from the first model's mistakes" in page
        assert "of the way" not in page and not re.search(r"−\d+\s%", page.replace("\u00a0", " "))


# -- can the score be trusted? --------------------------------------------------------------------


class TestTrust:
    def test_the_held_out_model_confirms_a_share_of_the_gain(self, tmp_path):
        """Check that half the score confirms half the gain."""
        says = sentences_of(fake_run(tmp_path, gold=False, held_out=True))
        assert any(
            re.search(r"^PPO gains .* by the held-out one \(95.*\), which confirms 50\u00a0% of it\.$", s) for s in says
        )
        assert not any("rm.held_out" in s for s in says)
        page = Page(page_of(fake_run(tmp_path / "page", gold=False, held_out=True))).text
        assert "Against a reward model of another seed" in page and "Held-out reward model" in page

    def test_without_another_model_the_page_says_how_to_train_one(self, tmp_path):
        says = sentences_of(fake_run(tmp_path, gold=False))
        assert says[-1].endswith("rankings.judge_fraction keeps rankings for one.")

    def test_the_kept_judge_stands_beside_the_climbed_one(self, tmp_path):
        """Best of n has a win rate by it only; where its interval holds one half, that is said."""
        ctx = fake_run(tmp_path, gold=False, kept=True)
        says = sentences_of(ctx)
        pattern = r"^PPO wins \d+\u00a0% .* by the reward model, which it climbed, and \d+\u00a0% by the kept judge"
        assert any(re.search(pattern, text) for text in says)
        assert any(
            re.search(r"^Best of 16 wins \d+\u00a0% of the comparisons with SFT by the kept judge", t) for t in says
        )
        assert says[-1].startswith("The kept judge learned from other rankings;")
        results = results_of(ctx)
        results["policies"]["ppo"]["judges"]["kept"]["win_rate_vs_sft"] |= {"value": 0.52, "ci95": [0.4, 0.64]}
        write_results(ctx, results)
        assert any("52\u00a0% by the kept judge" in text and "no clear gain" in text for text in sentences_of(ctx))

    def test_with_a_kept_judge_it_decides_and_its_accuracy_is_given(self, tmp_path):
        page = Page(page_of(fake_run(tmp_path, gold=False, kept=True))).text.replace("\u00a0", " ")
        assert "judged by the kept judge" in page and "no policy was trained on or selected by" in page
        assert "it agrees with the labeler on 70 % (95 % interval 68 to 73) of 2112 held-out pairs" in page
        assert "The judge is the reward model itself" not in page
        assert "selected by it" in page and "a reward model of 800 rankings that train nothing else" in page
        assert "score of the kept judge, SFT → PPO" in page and "Win rate against SFT by each judge" in page

    def test_beside_gold_each_judge_has_its_column(self, tmp_path):
        page = Page(page_of(fake_run(tmp_path, kept=True))).text
        assert "judged by the gold scorer" in page
        for judge in ("gold scorer", "reward model", "kept judge"):
            assert judge in page
        alone = Page(page_of(fake_run(tmp_path / "alone", gold=False))).text
        assert "Win rate against SFT by each judge" not in alone

    def test_the_terminal_gives_the_verdicts_of_all_judges(self, tmp_path):
        ctx = fake_run(tmp_path, kept=True)
        ctx.publish.joinpath("index.html").touch()
        console = Console(width=200, record=True, file=io.StringIO())
        report_terminal.show(ctx.publish, console)
        said = console.export_text()
        assert "kept judge: correct on 70.4\u00a0% of held-out pairs (68.0 to 73.0)" in said
        lines = [line for line in said.splitlines() if line.startswith("win rates by")]
        by = {line.split(":")[0]: line for line in lines}
        climbed, kept = by["win rates by the reward model"], by["win rates by the kept judge"]
        assert re.search(r"PPO \d+\u00a0% † \(", climbed) and "best of n" not in climbed
        assert "best of n" in kept and "†" not in kept

    def test_results_of_an_older_version_have_one_judge(self, tmp_path):
        ctx = fake_run(tmp_path, gold=False)
        results = results_of(ctx)
        for key in ("judge_name", "judges"):
            results.pop(key)
        for policy in results["policies"].values():
            policy.pop("judges")
        write_results(ctx, results)
        page = Page(page_of(ctx)).text
        assert "judged by the reward model" in page and "The judge is the reward model itself" in page
        assert "score, SFT → PPO" in page

    def test_settings_that_differ_from_training_are_notes(self, tmp_path):
        ctx = fake_run(tmp_path)
        results = results_of(ctx)
        found = {"setting": "evaluate.temperature", "value": 0.5, "training": "ppo.temperature", "training_value": 1.0}
        write_results(ctx, results | {"differs_from_training": [found]})
        assert "Evaluate.temperature is 0.5 and ppo.temperature 1.0" in Page(page_of(ctx)).text

    def test_length_is_blamed_only_where_responses_grew_and_gained_with_it(self, tmp_path):
        ctx = fake_run(tmp_path, gold=False)
        results = results_of(ctx)
        gain = {"value": 0.6, "ci95": [0.4, 0.8], "n": 40}
        results["overoptimisation"]["ppo"]["length"]["gain"] = gain
        for ours, blamed in ((30.0, True), (9.0, False)):
            results["policies"]["ppo"]["length"] = ours
            write_results(ctx, results)
            assert any("length alone may explain" in s for s in sentences_of(ctx)) == blamed
        results["policies"]["ppo"]["length"] = 30.0
        gain |= {"ci95": [-0.1, 0.8]}
        write_results(ctx, results)
        assert "PPO's gain does not clearly go with longer responses" in " ".join(sentences_of(ctx))

    def test_a_reward_model_that_scores_cut_responses_high_is_reported(self, tmp_path):
        ctx = fake_run(tmp_path, gold=False)
        results = results_of(ctx)
        for low, high, missing, said in (
            (-0.1, 0.4, -1.0, "only missing_eos_score −1.0 keeps"), (-0.1, 0.4, None, "nothing keeps a policy"),
            (-0.9, -0.2, None, None),
        ):  # fmt: skip
            results["missing_eos_score"] = missing
            for found in results["overoptimisation"].values():
                found["cut"]["difference"] = {"value": (low + high) / 2, "ci95": [low, high], "n": 80}
            write_results(ctx, results)
            assert any(said is not None and said in s for s in sentences_of(ctx)) == (said is not None)
            assert any("does not score" in s for s in sentences_of(ctx)) == (said is not None)
            console = Console(width=200, record=True, file=io.StringIO())
            report_terminal.show(ctx.publish, console)
            assert ("does not score" in console.export_text()) == (said is not None), "warnings are in the terminal too"

    def test_more_than_a_third_cut_is_reported_on_the_page_and_in_the_terminal(self, tmp_path):
        ctx = fake_run(tmp_path, gold=False)
        results = results_of(ctx)
        for rate, said in ((0.60, True), (0.70, False)):
            for name, policy in results["policies"].items():
                policy["eos_rate"] = rate if name in ("ppo", "base") else 0.9
            write_results(ctx, results)
            console = Console(width=200, record=True, file=io.StringIO())
            report_terminal.show(ctx.publish, console)
            for text in (Page(page_of(ctx)).text, console.export_text()):
                assert (
                    "More than a third of the responses of base (40\u00a0%) and PPO (40\u00a0%) are cut" in text
                ) == said


# -- samples ---------------------------------------------------------------------------------------


class TestSamples:
    def test_greedy_responses_are_shown_in_full_beside_sampled_ones(self, tmp_path):
        ctx = fake_run(tmp_path)
        rows = report.read_rows(ctx.inputs["evaluate"] / "greedy.jsonl")
        long = "word " * 3000 + "the end"
        write_rows(ctx.inputs["evaluate"] / "greedy.jsonl",
                   [row | {"response": long if row["policy"] == "ppo" else "short"} for row in rows])  # fmt: skip
        page = page_of(ctx)
        assert page.count(long) == page.count('<span class="tag t-ppo">PPO</span>\n')
        blocks = re.findall(r'<div class="answer">.*?\n</div>\n', page, re.S)
        kinds = [re.findall(r'<span class="figures">(\w+)', block) for block in blocks]
        assert kinds and all(found in (["sampled", "greedy"], ["selected"]) for found in kinds)

    def test_samples_are_shown_without_greedy_responses(self, tmp_path):
        ctx = fake_run(tmp_path)
        (ctx.inputs["evaluate"] / "greedy.jsonl").unlink()
        page = page_of(ctx)
        assert '<span class="figures">sampled' in page and '<span class="figures">greedy' not in page

    def test_a_shared_system_prompt_is_shown_once(self, tmp_path):
        page = page_of(fake_run(tmp_path, policies=FACE, gold=False, system=lambda i: "You are a kind helper."))
        assert page.count("You are a kind helper.") == 1
        assert "system prompt of every prompt below" in page and "system prompt 1" not in page

    def test_several_system_prompts_are_numbered(self, tmp_path):
        told = {0: "Be brief.", 1: "Be kind.", 2: None}
        ctx = fake_run(tmp_path, policies=FACE, gold=False, system=lambda i: told[i % 3])
        page = page_of(ctx)
        assert page.count("Be brief.") == page.count("Be kind.") == 1
        marks = re.findall(r"<small>system prompt (\d)</small>", page)
        systems = report_samples.SystemPrompts()
        rows, results = report.read_rows(ctx.inputs["evaluate"] / "responses.jsonl"), complete(results_of(ctx))
        report_samples.side_by_side(rows, [], results, NAMES, 12, systems)
        assert sorted(marks) == sorted(str(n + 1) for n, count in enumerate(systems.counts) for _ in range(count))
        assert systems.without > 0

    def test_a_prompt_of_only_a_system_message_is_kept(self):
        turns, number = report_samples.SystemPrompts().split([{"role": "system", "content": "say something"}])
        assert turns == [{"role": "system", "content": "say something"}] and number is None


# -- everybody can read it -------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours (WCAG 2.2)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


class TestReading:
    STYLE = (Path(report.__file__).parent / "page" / "style.j2").read_text(encoding="utf-8")

    @pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
    def test_every_text_colour_has_enough_contrast(self, scheme):
        blocks = re.findall(r":root \{(.*?)\}", self.STYLE, re.S)
        palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
        palette = palettes[scheme]
        texts = set(palette) - {"bg", "card", "line", "grid"}
        assert {"ink", "soft", "accent", "base", "sft", "ppo", "dpo", "best_of_n", "rm"} == texts
        low = {(text, on): round(contrast(palette[text], palette[on]), 2) for text in texts for on in ("bg", "card")}
        assert min(low.values()) >= 4.5, {pair: value for pair, value in low.items() if value < 4.5}

    def test_print_is_light_complete_and_keeps_legends(self):
        assert "@media screen and (prefers-color-scheme: dark)" in self.STYLE, "dark colours would be printed"
        paper = self.STYLE[self.STYLE.index("@media print") :]
        assert "size: A4" in self.STYLE
        for rule in ("details::details-content { content-visibility: visible", "print-color-adjust: exact",
                     ".scroll { overflow: visible", "white-space: normal"):  # fmt: skip
            assert rule in paper, rule

    @pytest.mark.parametrize("parts", [{}, {"policies": ("sft",), "gold": False, "world": False}], ids=str)
    def test_headings_go_down_one_level_at_a_time(self, tmp_path, parts):
        headings = Page(page_of(fake_run(tmp_path, **parts))).headings
        assert headings[0] == 1 and headings.count(1) == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(headings))

    def test_scrolling_regions_are_named_and_reachable_by_keyboard(self, drawn_run):
        page = Page((drawn_run.publish / "index.html").read_text(encoding="utf-8"))
        scrolls = [a for _, a in page.tags if "scroll" in (a.get("class") or "").split()]
        assert scrolls and all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolls)
        assert len({a["aria-label"] for a in scrolls}) == len(scrolls)
        hints = [a["class"] for tag, a in page.tags if tag == "p" and "hint" in (a.get("class") or "").split()]
        assert len(hints) > 5 and "hint many" in hints
        assert all(a.get("scope") for tag, a in page.tags if tag == "th")
        ids = [a["id"] for _, a in page.tags if "id" in a]
        drawings = [a for tag, a in page.tags if tag == "svg"]
        assert all(a["role"] == "img" and {a["aria-labelledby"], a["aria-describedby"]} <= set(ids) for a in drawings)
        assert len(set(ids)) == len(ids)
        assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(ids)
        assert ":focus-visible { outline: 2px" in self.STYLE

    def test_tables_of_many_labelers_are_folded(self):
        many = {f"labeler {i}": {"accuracy": 0.7, "n_pairs": 10} for i in range(40)}
        tables = results_tables.accuracy_tables(TRUST | {"accuracy_by_labeler": many})
        assert [bool(table.folded) for table in tables] == [False, True, False]
        assert tables[1].folded == "Accuracy by labeler: 40 rows" and len(tables[1].rows) == 40

    def test_accuracy_stands_beside_that_of_length(self):
        """For all pairs and each source; an older version's manifest gives no such table."""
        part = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "n_pairs": 30}
        prior = {"accuracy": 0.4, "accuracy_ci95": [0.3, 0.5], "n_pairs": 30}
        [table] = results_tables.accuracy_tables({**part, "longer_wins": prior})
        assert [cell.text for cell in table.rows[0]][::3] == ["all", "30"] and len(table.rows) == 1
        by_source = {"accuracy_by_source": {"people": part}, "longer_wins_by_source": {"people": prior}}
        [table] = results_tables.accuracy_tables({**part, "longer_wins": prior, **by_source})
        assert [row[0].text for row in table.rows] == ["all", "people"]
        assert results_tables.accuracy_tables(part) == []

    def test_the_glossary_has_only_the_words_of_the_page(self, tmp_path):
        assert all(meaning.endswith(".") and ". " not in meaning for _, _, meaning in report_glossary.WORDS)
        whole = dict(report_glossary.glossary({need for need, _, _ in report_glossary.WORDS}))
        assert len(whole) == len(report_glossary.WORDS)
        few = dict(report_glossary.glossary({"sft", "dpo"}))
        assert "KL" in few and "DPO" in few and not {"PPO", "Gold", "Reward model"} & set(few)
        page = Page(page_of(fake_run(tmp_path))).text
        assert all(
            meaning in page
            for word, meaning in whole.items()
            if word not in ("Held-out reward model", "Kept judge", "Round")
        )

    def test_hostile_text_is_escaped_everywhere(self, tmp_path):
        ctx = fake_run(tmp_path, world=False, gold=False, system=lambda i: HOSTILE)
        for manifest in ctx.manifests.values():
            manifest |= {"command": HOSTILE, "device": HOSTILE}
            manifest["config"] = {**manifest["config"], "model": {"name_or_path": HOSTILE}}
            manifest["config"]["data"] = {"demonstrations": {"path": HOSTILE, "rows": 1}}
        page = page_of(ctx)
        assert "<script" not in page and "<img" not in page


def test_a_policy_that_loses_is_reported_as_losing():
    """Check that a loss is a warning, as an unconfirmed gain is."""
    seen = {"held_out": {"difference_to_sft": {"value": -0.1, "ci95": [-0.3, 0.1]}}}
    results = {"overoptimisation": {"ppo": seen}, "policies": {"ppo": {"score": -0.88}, "sft": {"score": -0.21}}}
    finding = trust.by_held_out(results, "ppo", "PPO")
    assert finding.is_warning and finding.text.startswith(
        "PPO loses 0.67 against SFT by the reward model; its gain is \u22120.10 by the held-out one"
    )
