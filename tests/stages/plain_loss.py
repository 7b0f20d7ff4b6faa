"""The plain loss that small vocabularies train with, beside trl's own."""

import pytest
import torch


def assert_is_trls(make, tokenizer, items: int | None, folder, accumulated: int | None = None, **options) -> None:
    """Assert that the loss and the gradient of every weight are trl's, with masked labels and padding.

    Args:
        make: Returns the model, each time the same one.
        tokenizer: Its tokenizer.
        items: Labels that the loss is divided by; None: those of the batch.
        folder: Where trl's trainer may write.
        accumulated: Micro-batches of a step, as trl's trainer counts them; None: it does not count.
        options: More of SFTConfig's.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from stages.training.text_trainers import with_plain_loss

    options |= {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}
    rows, pad, found = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}], tokenizer.pad_token_id, []
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
        found.append((loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)
