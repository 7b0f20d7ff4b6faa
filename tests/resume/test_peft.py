"""Test each PEFT method in each stage: what it trains and publishes, and that it resumes."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from resume_worker import CONFIG, copy_without, published, rlhf
from safetensors.torch import load_file

from pipeline.config.checks import LOW_RANK
from stages.models.loading import load_policy
from stages.models.quantized import Quantized
from tests.builders import tiny_causal
from tests.marks import first_of_a_kind

BEFORE = {
    "sft": "base/model",
    "rm": "sft/model",
    "ppo": "sft/ppo_init",
    "dpo": "sft/model",
}  # the model that each begins with
ANY_LINEAR = r"_proj\.weight$"
EMBEDDING = r"embed_tokens\.weight$"
CHANGES = {
    "lora": ANY_LINEAR,
    "dora": ANY_LINEAR,
    "adalora": ANY_LINEAR,
    "ia3": r"(q_proj|v_proj)\.(weight|bias)$|down_proj\.weight$",
    "bitfit": r"\.bias$",
    "qlora, bits: 4": ANY_LINEAR,
    "qlora, bits: 8": ANY_LINEAR,
    "prompt_tuning, num_virtual_tokens: 4, prompt_tuning_init_text: What is the fox": EMBEDDING,
    "p_tuning, num_virtual_tokens: 4, encoder_reparameterization_type: lstm": EMBEDDING,
    "lora, use_rslora: true, target_modules: '.*[qv]_proj'": r"[qv]_proj\.weight$",
    "lora, init_lora_weights: pissa": ANY_LINEAR,
    "lora, init_lora_weights: olora, exclude_modules: [k_proj]": r"(?<!k)_proj\.weight$",
    "lora, modules_to_save: [norm, embed_tokens]": r"_proj\.weight$|model\.norm\.weight$|embed_tokens\.weight$",
}
RANK = 4
IN_PLACE = {
    "houlsby, bottleneck_size: 4": r"\.(self_attn|mlp)\.bottleneck\.(down|up)\.(weight|bias)$",
    "parallel_adapter, bottleneck_size: 4": r"\.mlp\.bottleneck\.(down|up)\.(weight|bias)$",
    "prefix_tuning, num_virtual_tokens: 6": r"^(prompt_embeddings|base_model\.score\.weight)$",
}  # methods whose adapters cannot be merged, and the tensors of their files


@pytest.fixture(scope="module")
def biased(oracle, tmp_path_factory):
    """Return a folder with a small Qwen2, a model that has biases."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(oracle / "micro" / "base" / "model")
    rows = len(tokenizer) + 1  # and <|endoftext|>, which transformers adds to a Qwen2's tokenizer
    shape = {"num_hidden_layers": 1, "num_key_value_heads": 1, "max_position_embeddings": 96}
    model = tiny_causal(
        "qwen2", 0, tokenizer, vocab_size=rows, initializer_range=0.02, tie_word_embeddings=True, **shape
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_apart(base, folder, load=load_policy):
    """Check that a published folder's adapter on `base` equals the published model."""
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = load(folder)(ids).logits
        before = load(base)(ids).logits
        found = PeftModel.from_pretrained(load(base), folder / "adapter")(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-4), "nothing was trained"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (folder / "adapter" / config["base_model_name_or_path"]).resolve() == base.resolve()


def test_the_adapters_of_sft_belong_on_base(tmp_path):
    options = ("model.peft={method: lora, r: 4, lora_dropout: 0.1}", "sft.learning_rate=1e-2")
    assert rlhf("run", "sft", "-c", str(CONFIG), "--artifacts", str(tmp_path), *options) == 0
    for name in ("model", "ppo_init"):
        assert_apart(tmp_path / "micro" / "base" / "model", tmp_path / "micro" / "sft" / name)


def test_rows_of_new_tokens_are_trained_and_resumed(oracle, tmp_path):
    """The model has no rows for its chat tokens; sft resumes exactly, and adapters fit on base."""
    from transformers import AutoTokenizer

    source, model = oracle / "micro" / "base" / "model", tmp_path / "model"
    shutil.copytree(source, model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>", "<say>"]})
    template = tokenizer.chat_template.replace("{{ eos_token }}", "<stop>")
    tokenizer.chat_template = template.replace("<|assistant|>", "<say>")
    tokenizer.save_pretrained(model)
    options = (f"model.name_or_path={model}", "model.peft={method: lora, r: 4}", "sft.learning_rate=1e-2")
    run = ("-c", str(CONFIG), *options, "--artifacts")
    whole = tmp_path / "whole"
    assert rlhf("run", "sft", *run, str(whole)) == 0
    for name in ("model", "ppo_init"):
        assert_apart(whole / "micro" / "base" / "model", whole / "micro" / "sft" / name)
        before, after = (load_file(whole / "micro" / f / "model.safetensors") for f in ("base/model", f"sft/{name}"))
        rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(-1).nonzero().flatten()
        assert rows.tolist() == tokenizer.convert_tokens_to_ids(["<stop>", "<say>"])  # shares its weight with the head
    for step in (5, 9):  # of model/ and of ppo_init/
        root = copy_without(whole, tmp_path / str(step), "sft")
        again = ("run", "sft", *run, str(root), "--only")
        assert rlhf(*again, die=("sft", step)) == -9
        assert rlhf(*again) == 0
        assert json.loads((root / "micro" / "sft" / "manifest.json").read_text())["resumes"] == 1
        assert published(root / "micro" / "sft") == published(whole / "micro" / "sft")


def bits_of(method):
    return int(method[-1]) if method.startswith("qlora") else None


@pytest.mark.slow
@pytest.mark.parametrize("method", first_of_a_kind(CHANGES, 1))
def test_a_method_in_every_stage(method, biased, tmp_path):
    if bits_of(method) and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (the extra qlora)")
    chain = tmp_path / "whole"
    setting = f", r: {RANK}" if method.partition(",")[0] in LOW_RANK else ""
    options = [f"model.name_or_path={biased}", f"model.peft={{method: {method}{setting}}}"]
    options += ["rm.keep=last", "ppo.keep=last"]  # the best model may be the one that the stage began with
    run = ("-c", str(CONFIG), *options, "--artifacts")
    assert rlhf("run", "evaluate", *run, str(chain)) == 0
    for stage, source in BEFORE.items():
        before = load_file(chain / "micro" / source / "model.safetensors")
        after = load_file(chain / "micro" / stage / "model" / "model.safetensors")
        changed = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
        assert changed - {"score.weight"}, "nothing was trained"
        odd = [n for n in changed - {"score.weight"} if not re.search(CHANGES[method], n)]
        assert not odd, f"{stage} changed {odd}"
        is_soft = CHANGES[method] == EMBEDDING
        assert (chain / "micro" / stage / "model" / "adapter").is_dir() == (method != "bitfit" and not is_soft)
        if is_soft:
            ids = json.loads((chain / "micro" / stage / "model" / "config.json").read_text())["soft_prompt_ids"]
            rows = [(before[n] != after[n]).any(-1).nonzero().flatten().tolist() for n in changed if "embed" in n]
            assert len(ids) == 4 and rows == [ids]
        if method.startswith("lora") or bits_of(method):
            linear = [n for n in changed if re.search(ANY_LINEAR, n)]
            rank = 2 * RANK if "init_" in method else RANK
            found = [learned(before[n], after[n], rank, bits_of(method)) for n in linear]
            assert all(small < 3e-7 for _, small in found), "more than an adapter was added to the base"
            assert max(large for large, _ in found) > 1e-5, "nothing was trained"
    for stage in BEFORE:
        assert_resumes(chain, stage, run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", first_of_a_kind(IN_PLACE, 1))
def test_a_method_whose_adapter_stays_in_the_model_in_every_stage(method, tmp_path):
    """The base model in base/ stays that of `base`; each stage trains its source's adapter on."""
    chain = tmp_path / "whole"
    options = [f"model.peft={{method: {method}}}", "sft.keep=last", "rm.keep=last", "ppo.keep=last", "dpo.keep=last"]
    run = ("-c", str(CONFIG), *options, "--artifacts")
    assert rlhf("run", "evaluate", *run, str(chain)) == 0
    base = load_file(chain / "micro" / "base" / "model" / "model.safetensors")
    for stage, source in BEFORE.items():
        folder = chain / "micro" / stage / "model"
        weights = load_file(folder / "base" / "model.safetensors")
        assert all(torch.equal(weights[name], base[name]) for name in weights if name != "score.weight")
        adapter = load_file(folder / "adapter_model.safetensors")
        assert adapter and all(re.search(IN_PLACE[method], name) for name in adapter)
        if stage != "sft":
            before = load_file(chain / "micro" / source / "adapter_model.safetensors")
            assert {name for name in adapter if name in before and not torch.equal(adapter[name], before[name])}
        assert_resumes(chain, stage, run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", first_of_a_kind(["pfeiffer", "prefix_tuning, prefix_projection: true, num_virtual_tokens: 6"], 1)
)
def test_sft_of_an_adapter_that_stays_in_the_model_resumes(method, tmp_path):
    chain = tmp_path / "whole"
    run = ("-c", str(CONFIG), f"model.peft={{method: {method}}}", "sft.learning_rate=1e-2", "--artifacts")
    assert rlhf("run", "sft", *run, str(chain)) == 0
    assert_resumes(chain, "sft", run, tmp_path)


def assert_resumes(chain, stage, run, tmp_path):
    """Check that a stage that is killed ends in the same bytes."""
    root = copy_without(chain, tmp_path / stage, stage)
    again = ("run", stage, *run, str(root), "--only")
    assert rlhf(*again, die=(stage, 5)) == -9
    assert rlhf(*again) == 0
    assert json.loads((root / "micro" / stage / "manifest.json").read_text())["resumes"] == 1
    assert published(root / "micro" / stage) == published(chain / "micro" / stage)


@pytest.mark.slow
def test_each_stage_with_an_adapter_of_its_own(tmp_path):
    """rm trains all weights, so the value model's new adapter is on them; ppo and dpo resume."""
    from transformers import AutoModelForSequenceClassification

    chain = tmp_path / "whole"
    options = ["model.peft={method: lora, r: 4, modules_to_save: [norm]}", "rm.peft=full", "sft.peft.use_rslora=true"]
    options += ["ppo.peft={r: 6, init_lora_weights: pissa}", "dpo.peft.method=dora", "ppo.keep=last"]
    run = ("-c", str(CONFIG), *options, "--artifacts")
    assert rlhf("run", "ppo", *run, str(chain)) == rlhf("run", "dpo", *run, str(chain)) == 0
    assert not (chain / "micro" / "rm" / "model" / "adapter").exists()
    rank = {"sft": 4, "ppo": 12, "dpo": 4}  # PiSSA is published as LoRA of twice the rank
    for stage, expected in rank.items():
        config = json.loads((chain / "micro" / stage / "model" / "adapter" / "adapter_config.json").read_text())
        dora = stage == "dpo"
        assert (config["r"], config["use_dora"], config["use_rslora"]) == (expected, dora, stage == "sft")
    assert_apart(chain / "micro" / "sft" / "ppo_init", chain / "micro" / "ppo" / "model")
    kind = AutoModelForSequenceClassification
    assert_apart(chain / "micro" / "rm" / "model", chain / "micro" / "ppo" / "value_model", kind.from_pretrained)
    rows = [json.loads(line) for line in (chain / "micro" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["objective/kl"] == 0  # the reference is the untouched base
    for stage in ("ppo", "dpo"):
        root = copy_without(chain, tmp_path / stage, stage)
        again = ("run", stage, *run, str(root), "--only")
        assert rlhf(*again, die=(stage, 5)) == -9
        assert rlhf(*again) == 0
        assert json.loads((root / "micro" / stage / "manifest.json").read_text())["resumes"] == 1
        assert published(root / "micro" / stage) == published(chain / "micro" / stage)


def test_an_adapter_from_elsewhere_is_in_the_base(oracle, tmp_path):
    """base merges it; other weights in the folder make it stale; sft's adapter is on the result."""
    given, source = tmp_path / "given", oracle / "micro" / "base" / "model"
    save_given(given, source, seed=1)
    options = (f"model.name_or_path={source}", f"model.adapter={given}", "model.peft={r: 4}", "sft.learning_rate=1e-2")
    run = ("-c", str(CONFIG), *options, "--artifacts", str(tmp_path / "a"))
    assert rlhf("run", "sft", *run) == 0
    base = tmp_path / "a" / "micro" / "base" / "model"
    from peft import PeftModel

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_policy(source), given)(ids).logits
        torch.testing.assert_close(load_policy(base)(ids).logits, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(load_policy(source)(ids).logits, expected, atol=1e-3)
    assert_apart(base, tmp_path / "a" / "micro" / "sft" / "model")
    save_given(given, source, seed=2)
    assert rlhf("run", "sft", *run, "--only") == 2  # base is stale


def save_given(folder, source, seed):
    """Save an adapter with random weights on a model, as peft does."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_policy(source), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)


def learned(before, after, rank, bits):
    """Measure what a stage added to a weight.

    Returns:
        Its largest singular value, and the first one beyond the rank.
    """
    if bits is not None:
        layer = torch.nn.Linear(before.shape[1], before.shape[0], bias=False)
        layer.weight.data = before
        before = Quantized(layer, bits).dequantized()
    values = torch.linalg.svdvals(after.double() - before.double())
    beyond = values[rank] if rank < len(values) else 0.0  # a narrow layer has no rank beyond
    return values[0], beyond
