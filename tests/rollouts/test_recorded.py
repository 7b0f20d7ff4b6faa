"""Compare decoding steps that a GPU records and replays with steps that run one by one."""

import warnings

import pytest
import torch

from stages.models.packing import reads_packed_rows
from stages.rollouts import lanes
from stages.rollouts.transformers import Decoding, sample_with_logprobs

PAD, EOS = 0, 1
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 19, 12, 6], [11, 4], [5, 9, 2]] * 4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", ["packed", "padded"], indirect=True)
def test_recorded_steps_are_the_steps(causal, monkeypatch, autocast):
    monkeypatch.setattr(lanes, "COLUMN_BLOCK", 8)
    monkeypatch.setattr(lanes, "WORTH_RECORDING", 2)
    model = causal(spread=0.1).cuda()
    replays, found = [], []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    for records in (True, False):
        if not records:
            monkeypatch.setattr(lanes.RecordedLane, "_record", lambda *_: False)
        with warnings.catch_warnings(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            warnings.simplefilter("error")
            decoding = Decoding(40, eos_id=EOS, pad_id=PAD, batch_size=20)
            found.append(sample_with_logprobs(model, PROMPTS, range(len(PROMPTS)), decoding))
    assert len(replays) > 5 if reads_packed_rows(model) else not replays
    assert found[0].responses == found[1].responses and len(set(map(len, found[0].responses))) > 2
    assert torch.equal(found[0].logprobs, found[1].logprobs) and torch.equal(found[0].entropy, found[1].entropy)
