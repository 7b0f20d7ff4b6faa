"""Test that an adapter trained elsewhere is merged into its base model, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.checks import adapter_folder_problem
from pipeline.errors import UserError
from stages.models.forward import response_logprobs
from stages.models.given_adapter import merge_given
from tests.builders import tiny_causal

CONFIGS = {
    "LORA": ("LoraConfig", {"r": 3, "target_modules": "all-linear"}),
    "DORA": ("LoraConfig", {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "IA3": ("IA3Config", {}),
    "VERA": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "full": ("LoraConfig", {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


def trained_elsewhere(folder, kind="LORA", base="someone/tiny", **more):
    """Save an adapter with random weights as peft does; return the model that it is on."""
    import peft

    name, options = CONFIGS[kind]
    config = getattr(peft, name)(task_type="CAUSAL_LM", **{**options, **more})
    model = peft.get_peft_model(tiny_causal("llama", 0, tie_word_embeddings=False), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder)
    change(folder, base_model_name_or_path=base)
    return model.eval()


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def base_model():
    return tiny_causal("llama", 0, tie_word_embeddings=False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_it_gives_the_adapted_numbers(kind, tmp_path, rows):
    expected = response_logprobs(trained_elsewhere(tmp_path, kind), rows)
    merged, line = merge_given(base_model(), tmp_path, "someone/tiny")
    assert type(merged) is type(base_model()) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(response_logprobs(merged, rows), expected, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base_model().named_parameters()}
    assert line.startswith(f"merged the adapter {tmp_path.name}") and "its base" not in line


def test_a_folder_in_place_of_the_name_is_told(tmp_path):
    trained_elsewhere(tmp_path)
    _, line = merge_given(base_model(), tmp_path, "/models/tiny")
    assert "it names someone/tiny as its base, and its weights fit" in line


@pytest.mark.parametrize(
    "entries, line",
    [
        ({"base_model_name_or_path": "someone/other"}, "was trained on someone/other, and model.name_or_path is"),
        ({"task_type": "SEQ_CLS"}, "was trained for SEQ_CLS"),
        ({"peft_type": "PREFIX_TUNING"}, "is PREFIX_TUNING, which cannot be merged"),
        ({"init_lora_weights": "pissa"}, r"its start \(pissa\) had changed"),
        ({"r": 5}, "does not fit someone/tiny"),
        ({"target_modules": ["q_proj"]}, "someone/tiny has no layer for .* and 23 more"),
        ({"target_modules": ["no_such"]}, "does not fit someone/tiny"),
        ({"peft_type": 3}, "is not peft's"),
        ({"peft_type": "BOTTLENECK"}, r"is of a type that the installed peft does not have \(BOTTLENECK\); merge"),
        ({"new_scale": 3.0, "other": None, "unsloth_fixed": True}, r"does not know and would leave out \(new_scale\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, entries, line):
    trained_elsewhere(tmp_path)
    change(tmp_path, **entries)
    with pytest.raises(UserError, match=f"^model.adapter: .*{line}"):
        merge_given(base_model(), tmp_path, "someone/tiny")


def test_a_whole_model_with_its_adapter_is_told_from_an_adapter(tmp_path):
    trained_elsewhere(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match=r"is a whole model with its adapter; name it in model.name_or_path"):
        merge_given(base_model(), tmp_path, "someone/tiny")


def test_missing_tensors_are_refused(tmp_path):
    trained_elsewhere(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"model.adapter: .* lacks .* and 0 more"):
        merge_given(base_model(), tmp_path, "someone/tiny")


def test_a_damaged_config_is_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        merge_given(base_model(), tmp_path, "someone/tiny")


def test_pickled_weights_are_not_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "holds pickled weights" in adapter_folder_problem(str(tmp_path))
    (tmp_path / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in adapter_folder_problem(str(tmp_path))
    assert "no such folder" in adapter_folder_problem(str(tmp_path / "other"))
    assert "no such folder" in adapter_folder_problem("")
