"""Compare the plain loss, used for small vocabularies, with trl's."""

import pytest
import torch


def assert_is_trls(make, tokenizer, items: int | None, folder, accumulated: int | None = None, **options) -> None:
    """Check that the loss and all gradients equal trl's, with masked labels and padding.

    Args:
        make: Function that returns the same model at each call.
        tokenizer: The model's tokenizer.
        items: Number of labels that the loss is divided by; None for those of the batch.
        folder: A folder that trl's trainer may write to.
        accumulated: Number of micro-batches in a step as trl counts them; None leaves the
            trainer's count unset.
        options: Further options of SFTConfig.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from stages.training.text_trainers import with_plain_loss

    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}
    rows, pad = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}], tokenizer.pad_token_id
    outcomes = []
    for kind in (SFTTrainer, with_plain_loss(SFTTrainer)):
        args = SFTConfig(output_dir=str(folder), dataset_kwargs={"skip_prepare_dataset": True}, **options)
        trainer = kind(model=make(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        if accumulated is not None:
            trainer.current_gradient_accumulation_steps = accumulated
        ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, pad, pad]])
        labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 11, 12, -100, -100]])
        batch = {"input_ids": ids, "attention_mask": (ids != pad).long(), "labels": labels}
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        outcomes.append((loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}))
    (expected, gradients), (loss, other_gradients) = outcomes
    assert expected == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)
