"""Check how finished policies are sampled: by themselves, or by an engine, each in turn."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from pipeline.errors import UserError
from stages.rollouts import frozen
from stages.rollouts.engine import EngineLost, EngineRules, EngineSpec, Sampled, SampleRequest
from stages.rollouts.engines import ENGINES
from stages.rollouts.frozen import FrozenSampler
from stages.rollouts.transformers import Decoding, TransformersEngine, sample
from stages.settings.rollout import EngineSettings
from stages.shared.engines import make_frozen_sampler
from tests.builders import EOS, tiny_causal

PROMPTS = [[5, 9, 2]] * 2 + [[7]] * 2
REQUEST = SampleRequest(PROMPTS, [1, 2, 3, 4], 2, response_length=6, temperature=0.8, eos_id=EOS)
GREEDY = replace(REQUEST, temperature=0.0)


class Elsewhere:
    """An engine that copies the weights it is given, and can fail."""

    is_policy = False

    def __init__(self, spec):
        self.own, self.model, self.closed = TransformersEngine(spec), None, False
        self.starts = self.updates = self.samples = 0
        self.fails_at, self.refuses, self.drift = None, False, 0.0

    def start(self, model, poll):
        if self.refuses:
            raise EngineLost("no room")
        self.starts += 1
        self.take(model)

    def update_weights(self, model):
        self.updates += 1
        self.take(model)

    def take(self, model):
        self.model = type(model)(model.config)
        self.model.load_state_dict(model.state_dict())

    def sample(self, request, poll):
        self.samples += 1
        if self.samples == self.fails_at:
            raise EngineLost("gone")
        self.own.start(self.model, poll)
        sampled = self.own.sample(request, poll)
        return Sampled(sampled.responses, sampled.logprobs - self.drift, sampled.entropy)

    def close(self):
        self.closed = True


@pytest.fixture
def policies():
    return {name: tiny_causal("llama", seed, vocab_size=20, initializer_range=0.3) for seed, name in enumerate("ab")}


@pytest.fixture
def spec(tmp_path):
    return EngineSpec(
        model=tmp_path,
        scratch=tmp_path / "scratch",
        log=tmp_path / "log",
        device=torch.device("cpu"),
        dtype="float32",
        autocast=nullcontext,
        pad_id=0,
        max_length=32,
        batch_size=4,
        timeout=60.0,
    )


def sampler_of(spec, monkeypatch, stops=True, limit=0.01) -> tuple[FrozenSampler, list[str]]:
    """Return a sampler by `Elsewhere`, and the lines that it says."""
    monkeypatch.setitem(ENGINES, "elsewhere", Elsewhere)
    said: list[str] = []
    return FrozenSampler("evaluate", "elsewhere", spec, EngineRules(limit, stops), said.append), said


def drawn(policies, name, request=REQUEST):
    """Return what the policy itself samples."""
    decoding = Decoding(request.response_length, EOS, 0, request.temperature, batch_size=4)
    if request.temperature == 0:
        decoding = replace(decoding, temperature=1.0, top_p=1e-9)
    return sample(policies[name], request.prompts, request.seeds, decoding)


def ask(sampler, policies, name, request=REQUEST):
    return sampler.sample(name, policies[name], request, 4, lambda: None)


def test_the_policy_itself_samples_so_many_rows_at_a_time(spec, policies, monkeypatch):
    sizes = []
    engine = lambda given: sizes.append(given.batch_size) or TransformersEngine(given)  # noqa: E731
    monkeypatch.setattr(frozen, "TransformersEngine", engine)
    sampler = make_frozen_sampler("rankings", EngineSettings(), spec, print)
    for name in "ab":
        assert ask(sampler, policies, name) == drawn(policies, name)
        assert ask(sampler, policies, name, GREEDY) == drawn(policies, name, GREEDY)
    assert sampler.sample("a", policies["a"], REQUEST, 3, lambda: None) == drawn(policies, "a")
    assert sizes == [4, 4, 4, 4, 3]
    sampler.close()


def test_another_engine_starts_when_it_is_needed_and_gets_each_policy_in_turn(spec, policies, monkeypatch):
    sampler, said = sampler_of(spec, monkeypatch)
    engine = sampler.engine
    assert engine.starts == 0 and said == []
    for name in ("a", "a", "b", "a"):
        for request in (REQUEST, GREEDY, replace(REQUEST, top_k=2)):
            again = TransformersEngine(spec)
            again.start(policies[name], lambda: None)
            assert ask(sampler, policies, name, request) == again.sample(request, lambda: None).responses
    assert (engine.starts, engine.updates) == (1, 2) and said == ["starting elsewhere"]
    assert engine.samples == 4 * 3 + 3, "each time it gets weights, a few responses are checked"
    sampler.close()
    assert engine.closed


@pytest.mark.parametrize("request_", [REQUEST, GREEDY])
def test_an_engine_that_samples_another_distribution_is_refused(request_, spec, policies, monkeypatch):
    sampler, _ = sampler_of(spec, monkeypatch)
    sampler.engine.drift = 0.5
    with pytest.raises(EngineLost, match=r"evaluate: the engine elsewhere does not sample from a's distribution"):
        ask(sampler, policies, "a", request_)
    assert sampler.engine.closed
    wide, _ = sampler_of(spec, monkeypatch, limit=10.0)
    wide.engine.drift = 0.5
    ask(wide, policies, "a", request_)


def test_where_it_fails_the_run_ends_or_the_policy_continues(spec, policies, monkeypatch):
    sampler, _ = sampler_of(spec, monkeypatch)
    sampler.engine.fails_at = 3
    ask(sampler, policies, "a")
    with pytest.raises(EngineLost, match=r"evaluate: gone; .*evaluate.rollout.engine=transformers --override-config"):
        ask(sampler, policies, "a")
    sampler, said = sampler_of(spec, monkeypatch, stops=False)
    sampler.engine.fails_at = 3
    for name in ("a", "a", "b"):
        assert ask(sampler, policies, name) == drawn(policies, name)
    assert said[1:] == ["gone; the policy samples by itself from now on"] and sampler.engine.updates == 0


def test_where_it_does_not_start(spec, policies, monkeypatch):
    sampler, _ = sampler_of(spec, monkeypatch)
    sampler.engine.refuses = True
    with pytest.raises(UserError, match=r"evaluate.rollout.engine: no room; see launch.elsewhere and its log"):
        ask(sampler, policies, "a")
    sampler, said = sampler_of(spec, monkeypatch, stops=False)
    sampler.engine.refuses = True
    assert ask(sampler, policies, "a") == drawn(policies, "a") and len(said) == 2
