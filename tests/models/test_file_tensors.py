"""Test the weights under their file names: those that `save_model` writes; the model is
unchanged.
"""

import pytest
import torch
from safetensors.torch import load_file

from stages.models.adapters import AdapterSettings, merge_adapter, trainable_parameters, with_adapter
from stages.models.file_tensors import file_tensors, tied_head

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", [None, "lora", "dora", "adalora", "ia3", "qlora"])
def test_they_are_what_is_published(causal, kind, method, tied, tmp_path):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
        if kind == "gpt2":
            pytest.skip("has no linear layers to quantize")
    settings = {"method": method, "r": 2, "bits": 4 if method == "qlora" else None}
    model = with_adapter(causal(kind, tie_word_embeddings=tied), AdapterSettings(**settings))
    generator = torch.Generator().manual_seed(0)
    for p in trainable_parameters(model).values():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = {name: x.clone() for name, x in file_tensors(model)}
    assert (tied_head(model) is None) == (not tied)
    if tied:
        head = found.pop(tied_head(model))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    merge_adapter(model).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=1e-6, rtol=1e-6)
    if tied:
        assert any(torch.equal(head, x) for x in expected.values())
