"""Check that policies answer piece by piece what `rlhf chat` answers, and stop when told to."""

import sys
import threading
from pathlib import Path

import pytest

from pipeline.config.sections import VllmSettings
from pipeline.errors import UserError
from stages.people.playground.answering import chosen_policies, load
from stages.people.playground.engine import Cancelled, Options, Piece, Question, Unanswerable
from stages.tools.chat_commands import Settings
from stages.tools.chat_speakers import Speaker, load_judge, reply
from tests.people.playground.experiments import experiment_of


@pytest.fixture(scope="module")
def loaded(store):
    experiment = experiment_of()
    return load(experiment, store, chosen_policies(["sft", "ppo", "base"], store), "transformers", False)


def options_of(**values):
    return Options(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 24, "seed": 3} | values))


def ask(loaded, text="what colour is the fox ?", policy="sft", poll=lambda: None, forgets=True, **options):
    """Return the reply and the pieces."""
    messages = tuple({"role": "user", "content": text} for text in ([text] if isinstance(text, str) else text))
    events = []
    question = Question(policy, messages, options_of(**options), forgets, scored=True)
    return loaded.answerers[policy](question, events.append, poll), [e.text for e in events if isinstance(e, Piece)]


@pytest.mark.parametrize("policy", ["sft", "ppo", "base"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5, "temperature": 0.7}])
def test_the_same_seed_and_settings_give_what_chat_says(store, loaded, policy, settings):
    found, pieces = ask(loaded, policy=policy, **settings)
    options = options_of(**settings)
    chat = Settings(options.temperature, options.top_p, options.seed, options.max_tokens, top_k=options.top_k)
    from stages.evaluation.forms import form_of_base
    from stages.models.loading import load_policy, load_tokenizer

    folder = store.folder(policy) / "model"
    form = form_of_base("auto", None) if policy == "base" else "chat"
    speaker = Speaker(policy, load_policy(folder), load_tokenizer(folder), form=form)
    said = reply(speaker, "what colour is the fox ?", chat, 1, "float32", load_judge(experiment_of(), store, False))
    assert (found.text, found.tokens, found.finished) == (said.text, said.tokens, said.finished)
    assert found.score == pytest.approx(said.score)
    assert "".join(pieces) == found.text and (len(pieces) > 2 or not found.text)


def test_another_seed_gives_another_text(loaded):
    assert ask(loaded)[0] == ask(loaded)[0] and ask(loaded)[0].text != ask(loaded, seed=4)[0].text


def test_a_stop_text_ends_the_answer_and_is_not_shown(loaded):
    whole = ask(loaded)[0].text
    for stop in (whole[8:10], whole[5], whole[3:9]):
        found, pieces = ask(loaded, stop=("no such text", stop))
        assert found.text == whole[: whole.index(stop)].strip() and found.finished
        assert "".join(pieces) == found.text
    assert ask(loaded, stop=(whole[5],))[0].tokens < ask(loaded)[0].tokens


def test_nobody_waits_any_more(loaded):
    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        ask(loaded, poll=poll)
    assert len(calls) == 4


def test_a_full_context_forgets_or_is_refused(loaded):
    turns = ["what colour is the fox ? " * 3] * 9
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns))
    question = Question("sft", messages, options_of(), True, True)
    found = loaded.answerers["sft"](question, lambda event: None, lambda: None)
    assert found.forgotten > 0 and found.prompt_tokens + 24 <= 128
    with pytest.raises(Unanswerable, match="context of 128"):
        refused = Question("sft", messages, options_of(), False, True)
        loaded.answerers["sft"](refused, lambda event: None, lambda: None)
    with pytest.raises(Unanswerable, match="the context only 128"):
        ask(loaded, "fox " * 300)


def test_names_of_policies(store, tmp_path):
    assert list(chosen_policies(None, store)) == ["sft", "ppo"]
    folder = store.folder("sft") / "model"
    assert list(chosen_policies([str(folder), "ppo"], store)) == ["model", "ppo"]
    two = [str(folder), str(store.folder("ppo") / "model")]
    for names, what in (["rm"], "policies: rm .*reward model"), (["dpo"], "dpo"), (two, "policies: two"):
        with pytest.raises(UserError, match=what):
            chosen_policies(names, store)


def test_a_reward_model_that_is_none(store, tmp_path):
    with pytest.raises(UserError, match=r"playground\.reward_model: .* no folder"):
        load(experiment_of(reward_model=str(tmp_path)), store, chosen_policies(["sft"], store), "transformers", False)
    none = load(experiment_of(reward_model=None), store, chosen_policies(["sft"], store), "transformers", False)
    assert not none.is_scored and ask(none)[0].score is None
    folder = store.folder("rm") / "model"
    own = load(experiment_of(reward_model=str(folder)), store, chosen_policies(["sft"], store), "transformers", False)
    assert own.is_scored and ask(own)[0].score is not None


def test_vllm_answers_in_a_thread_whole_and_up_to_the_stop_text(store, tmp_path):
    """A stand-in for vLLM runs in a process of its own."""
    stand_in = Path(__file__).parents[2] / "rollouts" / "stand_in"
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{stand_in}" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    experiment = experiment_of()
    experiment.launch = experiment.launch.model_copy(update={"vllm": VllmSettings(python=str(script))})
    served = load(experiment, store, chosen_policies(["sft"], store), "vllm", False)
    found = []

    def answer(*stop):
        thread = threading.Thread(target=lambda: found.append(ask(served, stop=stop)))
        thread.start()
        thread.join()

    try:
        answer()
        whole = found[0][0].text
        answer(whole[5:7])
    finally:
        served.close()
    assert len(whole) > 7 and found[0][1] == [whole] and found[0][0].score is not None
    assert found[1][0].text == whole[: whole.index(whole[5:7])].strip() and found[1][0].finished
