"""Parameter-efficient tuning: wrap (by peft), choose what trains, merge for publication.

LoRA (Hu 2021), DoRA (Liu 2024) and IA³ (Liu 2022) are adapters; BitFit (Ben Zaken 2021) trains the model's own biases.
"""

import contextlib

from torch import nn

from pipeline.errors import UserError
from stages.models.loading import score_head


def with_adapter(model, *, method: str | None, seed: int = 0, **settings):
    """The model itself (`method` None: every weight trains; "bitfit": its biases) or a PeftModel. A scalar head always
    trains in full. settings: those of `adapter_config`."""
    if method is None:
        model.requires_grad_(True)
        return model
    config = adapter_config(model, method=method, **settings)
    if config is None:
        return model
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)  # adapters start from random A matrices
    adapted = get_peft_model(model, config)
    for module in adapted.modules():  # lora_dropout is for SFT: rollout and update must give the same log-probs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return adapted.eval()


def adapter_config(
    model,
    *,
    method: str,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules="all-linear",
    scalar: bool = False,
):
    """peft's configuration, for `with_adapter` and for trl's trainer; None for BitFit, which needs none: then what
    trains of `model` is chosen here."""
    from peft import IA3Config, LoraConfig, TaskType
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_LAYERS

    what = {
        "task_type": TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        "modules_to_save": ["score"] if scalar else None,
    }
    if method == "bitfit":
        train_biases(model, list(score_head(model).parameters()) if scalar else [])
        return None
    if method == "ia3":
        if model.config.model_type not in IA3_LAYERS:
            raise UserError(f"model.peft.method: peft knows no ia3 for a {model.config.model_type} model; use lora")
        return IA3Config(**what)  # keys, values and feed-forward layers, by peft's names of them
    assert method in ("lora", "dora")
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        use_dora=method == "dora",
        **what,
    )


def train_biases(model, head: list[nn.Parameter]) -> None:
    """Biases and the head are all that trains; a UserError for a model that has no bias (Llama)."""
    model.requires_grad_(False)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise UserError(
            f"model.peft.method: bitfit trains biases, and this {model.config.model_type} model has none; use lora"
        )
    for p in biases + head:
        p.requires_grad_(True)


def is_adapted(model) -> bool:
    return hasattr(model, "merge_and_unload")


def merged(model):
    """A plain transformers model with the adapter folded in (ends the adapter: call it when training is over)."""
    return model.merge_and_unload() if is_adapted(model) else model


@contextlib.contextmanager
def adapter_off(model):
    """Inside, an adapted model is its own base: the reference policy at no memory."""
    with model.disable_adapter():
        yield model


def plain(model) -> nn.Module:
    """The transformers model inside a PeftModel, adapters still at work in its layers."""
    return model.get_base_model() if is_adapted(model) else model


def trainable(model) -> dict[str, nn.Parameter]:
    """Named parameters that train, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
