"""Parameter-efficient tuning through peft: wrap, choose what trains, merge for publication."""

import contextlib

from torch import nn


def with_adapter(
    model,
    *,
    method: str | None,
    r: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules="all-linear",
    scalar: bool = False,
    seed: int = 0,
):
    """The model itself (`method` None: every weight trains) or a PeftModel. A scalar head always trains in full."""
    if method is None:
        model.requires_grad_(True)
        return model
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)  # adapters start from random A matrices
    adapted = get_peft_model(
        model,
        lora_config(
            method=method,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            scalar=scalar,
        ),
    )
    for module in adapted.modules():  # lora_dropout is for SFT: rollout and update must give the same log-probs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return adapted.eval()


def lora_config(*, method: str, r: int, lora_alpha: int, lora_dropout: float, target_modules, scalar: bool = False):
    """peft's configuration, for `with_adapter` and for trl's trainer."""
    from peft import LoraConfig, TaskType

    assert method == "lora"
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scalar else None,
    )


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
