"""The plain loss that small vocabularies train with, against trl's own."""

import pytest
import torch


@pytest.mark.parametrize("items", [None, 7])
def test_the_plain_loss_is_trls(tmp_path, items):
    """Loss and the gradient of every weight, with masked labels and padding."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from data.encode import train_tokenizer
    from stages.language_modeling import with_plain_loss

    tokenizer = train_tokenizer(["the fox is red .", "say hello twice ."] * 3, vocab_size=300)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    found = []
    for kind in (SFTTrainer, with_plain_loss(SFTTrainer)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, initializer_range=0.3))
        rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}])
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False}
        args = SFTConfig(output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **options)
        trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, tokenizer.pad_token_id, tokenizer.pad_token_id]])
        labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, 11, 12, -100, -100]])
        batch = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in trainer.model.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)
