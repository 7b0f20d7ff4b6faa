"""The README.md of a published model: what it is, and how it is used with transformers alone."""

from pipeline.stage import StageRun
from stages.models.families import is_own_head

ANSWER = """\

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "model"  # where this folder is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                       return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=64)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""
SCORE = """\

A score is the logit at the response's EOS, less `reward_bias` of `config.json` (by which demonstrations score 0 on
average): transformers alone does not subtract it.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "model"  # where this folder is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                       return_dict=False)
response = tokenizer("Hi there.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
score = model(torch.tensor([prompt + response])).logits[0, 0] - model.config.reward_bias
```
"""
OWN_HEAD = """\

The family has no sequence classification in transformers that serves: the class with the scalar head stands in
scalar_head.py, and transformers loads it with `trust_remote_code=True`.
"""


def use_of(model, text: str) -> str:
    """The lines by which a reward or value model is used: `text` (SCORE, or none), and what is to be said where its
    class is a file of the folder."""
    if not is_own_head(model):
        return text
    load = "AutoModelForSequenceClassification.from_pretrained(folder"
    return OWN_HEAD + text.replace("tokenizer, model = AutoTokenizer.from_pretrained(folder), " + load + ")",
                                   "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
                                   "model = " + load + ", trust_remote_code=True)")  # fmt: skip


def card(ctx: StageRun, what: str, use: str = "") -> str:
    """A short model card. use: the lines of Python that the model is used by, ANSWER or SCORE."""
    return (
        f"---\nlibrary_name: transformers\ntags: [rlhf, {ctx.stage}]\n---\n"
        f"# {ctx.experiment.name} / {ctx.stage}\n\nThis folder holds {what}, made by the stage `{ctx.stage}` of the "
        f"experiment `{ctx.experiment.name}`. `manifest.json` beside it records settings, inputs and digests.\n"
        f"{use}"
    )
