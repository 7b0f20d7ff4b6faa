"""Check chat: commands, answers and memory, with tiny models of random weights."""

import io
import os
import re
import signal
import sys
from pathlib import Path
from tempfile import gettempdir

import pytest
from rich.console import Console

from data.encode import encode_prompt
from data.tokenizer import train_tokenizer
from pipeline.config.sections import VllmSettings
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.models.loading import from_scratch, load_policy, load_tokenizer, new_reward_model
from stages.models.publish import save_model
from stages.settings.rollout import EngineSettings
from stages.tools import chat, chat_commands, chat_engines, chat_panels, chat_speakers
from tests.people.playground.experiments import experiment_of

EXPERIMENT = experiment_of()
EXPERIMENT.evaluate.response_length = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Publish sft, ppo and base with different weights, and rm with an ensemble of two; no dpo."""
    store = ArtifactStore(tmp_path_factory.mktemp("artifacts"), "fake")
    tokenizer = train_tokenizer(["the fox is red . what colour is the fox ?"] * 3, 300)
    shape = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    for seed, stage in enumerate(("sft", "ppo", "rm", "base")):
        with store.lock(stage):
            content = store.folder(stage) / ".tmp-publish"
            if stage == "rm":
                model = new_reward_model(store.folder("sft") / "model", seed=0)
                model.config.reward_bias = 0.0
                save_model(model, tokenizer, content / "ensemble" / "1", card="")
                model.config.reward_bias = 100.0
            else:
                model = from_scratch(tokenizer, seed=seed, **shape)
            save_model(model, tokenizer, content / "model", card="")
            fields = ("fingerprint", "config", "inputs", "metrics", "finished_at", "run_id")
            store.publish(stage, content, {"stage": stage} | dict.fromkeys(fields, ""))
    return store


def settings_of(**values) -> chat_commands.Settings:
    """Return settings, with the command line's defaults for those that are not given."""
    defaults = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "max_new_tokens": 6}
    return chat_commands.Settings(**(defaults | values))


def talk(store, monkeypatch, lines, models=("sft", "ppo"), width=100, engine=None, **settings) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    console = Console(width=width, record=True, file=io.StringIO())
    assert chat.run(EXPERIMENT, store, list(models), settings_of(**settings), console=console, engine=engine) == 0
    return console.export_text()


def speaker_of(store, stage="sft") -> chat_speakers.Speaker:
    folder = store.folder(stage) / "model"
    return chat_speakers.Speaker(stage, load_policy(folder), load_tokenizer(folder))


def test_answers_side_by_side_with_scores_until_the_input_ends(store, monkeypatch):
    text = talk(store, monkeypatch, ["what colour is the fox ?", "", "and the frog ?"])
    heads = [line for line in text.splitlines() if "sft ─" in line]
    assert len(heads) == 2 and all("ppo ─" in head for head in heads)
    assert text.count("score ") == 4 and "token" in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_ensemble_scores_as_evaluate_has_it_do(store, monkeypatch):
    """The second model of the ensemble scores 100 higher than the first."""
    text = talk(store, monkeypatch, ["what colour is the fox ?"])
    assert text.count("score -") == 2
    monkeypatch.setattr(EXPERIMENT.evaluate, "reward_ensemble", "mean")
    said = re.findall(r"score ([+-][\d.]+)", talk(store, monkeypatch, ["what colour is the fox ?"]))
    assert len(said) == 2 and all(-53 < float(score) < -47 for score in said)


def test_narrow_terminals_get_panels_below_each_other(store, monkeypatch):
    text = talk(store, monkeypatch, ["hello"], width=60)
    assert not [line for line in text.splitlines() if "sft ─" in line and "ppo ─" in line]


def test_same_seed_same_words_and_temperature_0_ignores_it(store, monkeypatch):
    say = lambda *lines: talk(store, monkeypatch, [*lines, "hello"]).split("hello")[1]  # noqa: E731
    assert say("/sample", "/seed 3") == say("/sample", "/seed 3") != say("/sample", "/seed 4")
    assert say("/temp 0", "/seed 3") == say("/temp 0", "/seed 4") == say("/sample 2", "/greedy") == say()


def test_top_k(store, monkeypatch):
    """The likeliest token alone is what greedy says; 0 draws from all again."""
    say = lambda *lines: talk(store, monkeypatch, [*lines, "hello"]).split("hello")[1]  # noqa: E731
    assert say("/sample 2", "/top_k 1") == say("/greedy") != say("/sample 2", "/top_k 1", "/top_k 0")
    text = talk(store, monkeypatch, ["/top_k 5", "/top_k -1", "/top_k few", "/sample"])
    assert "top_k 5, top_p 1" in text and "-1 is out of range; use 1 or more" in text and "whole number" in text
    assert "/top_k takes effect with /sample" in text


def test_commands(store, monkeypatch):
    text = talk(
        store,
        monkeypatch,
        ["/help", "/temp warm", "/top_p 2", "/top_p 0.9", "/system be kind", "/dance", "/reset", "/quit", "never read"],
    )
    assert "/system TEXT" in text and "'warm' is not a number" in text and "2.0 is out of range" in text
    assert (
        "top_p 0.9" in text and "system: be kind" in text and "/dance is not a command" in text and "forgotten" in text
    )
    assert "never read" not in text


def test_memory_is_kept_and_oldest_turns_are_dropped_when_the_context_is_full(store):
    speaker, settings = speaker_of(store), chat_commands.Settings(1.0, 1.0, 0, 6)
    for turn in range(8):
        answer = chat_speakers.reply(speaker, "what colour is the fox ?", settings, turn, "float32", None)
        assert answer.text == speaker.history[-1]["content"] and not answer.problem
    assert 2 <= len(speaker.history) < 16
    assert len(encode_prompt(speaker.tokenizer, speaker.history[:-1])) + 6 <= 64
    problem = chat_speakers.reply(speaker, "fox " * 100, settings, 9, "float32", None).problem
    assert "and the context only" in problem


def test_system_message_and_memory_reach_the_model(store, monkeypatch):
    seen = []
    monkeypatch.setattr(chat_speakers, "sample_answer", lambda _, request, *__: seen.append(request.prompts[0]) or [7])
    speaker = speaker_of(store)
    for text in ("hello", "and the fox ?"):
        chat_speakers.reply(speaker, text, chat_commands.Settings(1.0, 1.0, 0, 6, "be kind"), 0, "float32", None)
    assert speaker.tokenizer.decode(seen[0]) == "<|system|> be kind<|user|> hello<|assistant|>"
    assert seen[1][: len(seen[0])] == seen[0] and speaker.tokenizer.decode(seen[1]).endswith(
        "<|user|> and the fox ?<|assistant|>"
    )


def test_a_template_that_takes_no_system_message_is_a_problem_of_that_turn(store):
    speaker = speaker_of(store)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    speaker.tokenizer.chat_template = refusing + speaker.tokenizer.chat_template
    settings = chat_commands.Settings(1.0, 1.0, 0, 6, "be kind")
    problem = chat_speakers.reply(speaker, "hello", settings, 0, "float32", None).problem
    assert "no system" in problem and "/system without a text" in problem
    settings.system = ""
    assert not chat_speakers.reply(speaker, "hello", settings, 0, "float32", None).problem


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_text_is_requested_again(store, monkeypatch, errors):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", stdin)
    console = Console(width=100, record=True, file=io.StringIO())
    assert chat.read_line(console) == "" and "is not UTF-8 text" in console.export_text()


def test_escape_codes_of_a_model_do_not_reach_the_terminal():
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    chat_panels.print_panels([("sft", chat_speakers.Answer("a\x1b]0;title\x07 [red]b[/red] \x9bc", 3))], console)
    out = console.file.getvalue()
    assert "\x1b]0" not in out and "\x9b" not in out and "\x07" not in out and "[red]b[/red]" in out


@pytest.mark.parametrize(
    "models, what",
    [
        (["dpo"], "rlhf run dpo -c CONFIG"),
        (["rm"], "does not answer"),
        (["nobody"], "published stage .base, sft, ppo."),
        ([], "names no model"),
    ],
)
def test_models_that_cannot_talk_are_the_users_mistake(store, models, what):
    with pytest.raises(UserError, match=what):
        chat.run(EXPERIMENT, store, models, settings_of())


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}],
)
def test_senseless_settings_are_the_users_mistake(store, settings):
    with pytest.raises(UserError, match="; use "):
        chat.run(EXPERIMENT, store, ["sft"], settings_of(**settings))


def test_a_damaged_artifact_is_named(store):
    file = store.folder("ppo") / "model" / "config.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole.replace(b"1", b"2", 1))
        with pytest.raises(UserError, match=r"config\.json: sha256"):
            chat.run(EXPERIMENT, store, ["sft", "ppo"], settings_of())
    finally:
        file.write_bytes(whole)


def test_a_folder_talks_too(store, monkeypatch):
    assert "score" in talk(store, monkeypatch, ["hello"], models=[str(store.folder("sft") / "model")])


def test_the_likeliest_token_is_taken_by_default(store):
    """Compare token by token with transformers' greedy decoding."""
    import torch

    speaker = speaker_of(store)
    ids = encode_prompt(speaker.tokenizer, "what colour is the fox ?")
    with torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": speaker.tokenizer.pad_token_id}
        right = speaker.model.generate(torch.tensor([ids]), **options)[0, len(ids) :]
    answer = chat_speakers.reply(
        speaker, "what colour is the fox ?", chat_commands.Settings(0.0, 1.0, 0, 6), 1, "float32", None
    )
    assert answer.text == speaker.tokenizer.decode(right, skip_special_tokens=True) and answer.tokens == len(right)


def answering(monkeypatch, *answers):
    """Let policies answer with these ids, one after another."""
    given = iter(answers)
    monkeypatch.setattr(chat_speakers, "sample_answer", lambda *_: next(given))


def test_a_cut_answer_scores_what_evaluate_gives_it(store, monkeypatch):
    """Whatever the reward model's own score is. A cut answer is never green."""
    monkeypatch.setattr(EXPERIMENT.evaluate, "missing_eos_score", 3.0)
    ended = load_tokenizer(store.folder("sft") / "model").eos_token_id
    answering(monkeypatch, [7, 8], [7, 8, ended])
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    assert chat.run(EXPERIMENT, store, ["sft", "ppo"], settings_of(), console=console) == 0
    text = console.export_text(clear=False, styles=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    cut, whole = re.findall(r"score ([+-][\d.]+)", plain)
    assert cut == "+3.00" and float(whole) < -90, "min of the ensemble, whose second bias is 100"
    assert "\x1b[1;32mscore" not in text, "the highest score is a cut answer's"
    said = " ".join(plain.split())
    assert "an answer that is cut off gets 3" in said and "2 tokens, cut off" in said
    assert (
        "cut off before the end: sft; that scores 3 (evaluate.missing_eos_score), whatever was said; /max 12 gives more"
    ) in said
    monkeypatch.setattr(EXPERIMENT.evaluate, "missing_eos_score", None)
    answering(monkeypatch, [7, 8], [7, 8, ended])
    own = re.findall(r"score ([+-][\d.]+)", talk(store, monkeypatch, ["hello"]))
    assert all(float(score) < -90 for score in own), "without one, the reward model's own"


def test_a_finished_answer_with_the_highest_score_is_green(store, monkeypatch):
    ended = load_tokenizer(store.folder("sft") / "model").eos_token_id
    monkeypatch.setattr(EXPERIMENT.evaluate, "missing_eos_score", -500.0)
    answering(monkeypatch, [7, 8], [7, 8, ended])
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    chat.run(EXPERIMENT, store, ["sft", "ppo"], settings_of(), console=console)
    green = re.findall(r"\x1b\[1;32mscore ([+-][\d.]+)", console.export_text(styles=True))
    assert len(green) == 1 and -500 < float(green[0]) < -90


def test_base_from_scratch_is_prompted_in_plain_text_as_in_evaluate(store, monkeypatch):
    seen = []
    monkeypatch.setattr(chat_speakers, "sample_answer", lambda _, request, *__: seen.append(request.prompts[0]) or [7])
    text = talk(store, monkeypatch, ["hello fox"], models=["base", "sft"])
    tokenizer = load_tokenizer(store.folder("sft") / "model")
    assert [tokenizer.decode(ids).strip() for ids in seen] == ["hello fox", "<|user|> hello fox<|assistant|>"]
    assert "base is prompted in plain text" in text and text.count("score ") == 2
    monkeypatch.setattr(EXPERIMENT.model, "name_or_path", "org/name")
    assert "plain text" not in talk(store, monkeypatch, ["hello fox"], models=["base"])
    assert seen[2] == seen[1]


def test_memory_is_shown_and_can_be_turned_off(store, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(chat_speakers, "sample_answer", lambda _, request, *__: seen.append(request.prompts[0]) or [7])
    text = talk(store, monkeypatch, ["one", "two", "/memory off", "three", "/memory on", "/reset", "four"], ["sft"])
    decode = load_tokenizer(store.folder("sft") / "model").decode
    asked = [[part.split("<")[0].strip() for part in decode(ids).split("<|user|>")[1:]] for ids in seen]
    assert asked == [["one"], ["one", "two"], ["three"], ["four"]]
    assert (
        "memory is on: each policy reads the conversation so far" in text
        and "memory off" in text
        and "forgotten" in text
    )
    prompts = [line for line in capsys.readouterr().out.splitlines() if "▸" in line]
    assert prompts == ["you ▸ ", "you, turn 2 ▸ ", "you, turn 3 ▸ ", "you ▸ ", "you ▸ ", "you, turn 4 ▸ ", "you ▸ ",
                       "you, turn 2 ▸ "]  # fmt: skip


def test_a_full_context_says_what_it_forgot(store, monkeypatch):
    text = talk(store, monkeypatch, ["what colour is the fox ?"] * 9, ["sft"])
    assert re.search(r"the context is full; oldest turns forgotten: sft \d", text)


def test_the_length_can_be_changed(store, monkeypatch):
    text = talk(store, monkeypatch, ["/max 3", "hello", "/max 0", "/max many", "/mx 3"], ["sft"])
    assert "at most 3 tokens" in text and "3 tokens, cut off" in text
    assert "0 is too few" in text and "'many' is not a whole number; for example /max 3" in text
    assert "/mx is not a command; did you mean /max?" in text
    assert "/seed takes effect with /sample" in talk(store, monkeypatch, ["/seed 3"], ["sft"])


class TestVllm:
    """Chat through a stand-in for vLLM, which runs in a process of its own."""

    @pytest.fixture
    def python(self, tmp_path, monkeypatch):
        """Let launch.vllm.python be an environment with the stand-in."""
        stand_in = Path(__file__).parents[2] / "rollouts" / "stand_in"
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nPYTHONPATH="{stand_in}" exec {sys.executable} "$@"\n')
        script.chmod(0o755)
        self.set(monkeypatch, python=str(script))
        return str(script)

    def set(self, monkeypatch, **settings):
        monkeypatch.setattr(
            EXPERIMENT, "launch", EXPERIMENT.launch.model_copy(update={"vllm": VllmSettings(**settings)})
        )

    def test_each_policy_answers_from_its_own(self, store, monkeypatch, python):
        """Greedily both give the same; policies are not loaded here, and nothing is left behind."""
        question, files = ["what colour is the fox ?", "and the frog ?"], set(Path(gettempdir()).glob("rlhf-chat-*"))
        expected = talk(store, monkeypatch, question)
        monkeypatch.setattr("stages.models.loading.load_policy", lambda *_, **__: pytest.fail("loaded here"))
        assert talk(store, monkeypatch, question, engine="vllm") == expected
        monkeypatch.setattr(EXPERIMENT.evaluate, "rollout", EngineSettings(engine="vllm"))
        assert talk(store, monkeypatch, question) == expected, "evaluate's engine is the default"
        assert set(Path(gettempdir()).glob("rlhf-chat-*")) == files

    def test_its_end_is_said_where_the_answer_would_be(self, store, monkeypatch, python):
        self.set(monkeypatch, python=python, options={"dies_at": 2})
        text = talk(store, monkeypatch, ["hello", "hello"], models=("sft",), engine="vllm")
        assert "vLLM ended" in text and text.count("token") > 0

    def test_a_start_that_fails(self, store, monkeypatch, python):
        self.set(monkeypatch, python=python, options={"refuses": "no room"})
        with pytest.raises(UserError, match=r"--engine: sft: vLLM says ValueError: no room.*see launch.vllm and"):
            talk(store, monkeypatch, ["hello"], engine="vllm")

    def test_a_python_that_is_missing(self, store, monkeypatch):
        self.set(monkeypatch, python="nowhere/python")
        with pytest.raises(UserError, match=r"launch.vllm.python: nowhere/python is not a program"):
            talk(store, monkeypatch, ["hello"], engine="vllm")

    def test_ctrl_c_waits_for_the_answer(self):
        """Otherwise the next question would get the answer to the last one."""
        done = []
        with pytest.raises(KeyboardInterrupt), chat_engines.held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)
        assert done


def test_reward_models_that_are_divided_among_processes_are_not_loaded(store, monkeypatch):
    monkeypatch.setattr(EXPERIMENT, "launch", EXPERIMENT.launch.model_copy(update={"strategy": "fsdp2"}))
    assert "score " in talk(store, monkeypatch, ["hello"])
    monkeypatch.setattr(EXPERIMENT, "launch", EXPERIMENT.launch.model_copy(update={"nodes": 4}))
    monkeypatch.setattr(chat, "load_judge", lambda *_: pytest.fail("loaded"))
    text = talk(store, monkeypatch, ["hello"])
    assert "not scored: each model is sharded" in text and "score " not in text.replace("not scored", "")


def test_one_of_several_processes_is_refused(monkeypatch, capsys):
    from pipeline.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    config = Path(__file__).parents[2] / "resume" / "micro.yaml"
    assert main(["chat", "-c", str(config), "--models", "sft"]) == 2
    assert "chat: it is one process" in capsys.readouterr().err
