"""Run sft and evaluate on conversations of several turns."""

import json

from data.parsing import parse_demonstration
from data.turns import conversation_key
from tests.encoded import encode_demonstrations
from tests.stages.micro_chain import spy, write_rows

SFT = ("sft.max_steps=2", "sft.max_length=96", "sft.sample_tokens=0", "sft.per_device_train_batch_size=2")
ASKED = [
    "what color is the fox ?",
    "is the fox red ?",
    "hello old fox .",
    "what is blue ?",
    "is the fox old ?",
    "hello .",
]


def talk(opening: str, turns: int) -> dict:
    """Return a conversation that begins with a question and has that many answers."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": opening if turn == 0 else "yes ?"})
        messages.append({"role": "assistant", "content": "the fox is red ." if turn else "no ."})
    return {"messages": messages}


def conversations() -> list[dict]:
    """Return conversations at several depths; one ends unanswered, one has a weight of 0."""
    rows = [talk(opening, turns) for opening in ASKED for turns in (1, 2, 3)]
    rows[1]["messages"].append({"role": "user", "content": "no"})
    rows[4]["messages"][1]["weight"] = 0
    return rows


def run(chain, folder, rows: list[dict], *settings: str, stage: str = "sft", **more):
    """Run a stage on demonstrations of its own."""
    path = folder.with_suffix(".jsonl")
    write_rows(path, rows)
    return chain.run(stage, folder, *SFT, f"data.demonstrations={path}", *settings, **more)


def test_all_turns_are_learnt_and_counted(chain, tmp_path, monkeypatch):
    import stages.sft

    calls = spy(monkeypatch, stages.sft, "train_language_model")
    done = run(chain, tmp_path / "all", conversations())
    assert "; 36 assistant turns, 35 learnt; " in done.said
    assert "demonstrations: left out, 1: the user's message at the end of a conversation, which nobody" in done.said
    assert "; left out, 1: an earlier answer that the data exclude (weight 0)" in done.said
    assert (done.figures["assistant_turns"], done.figures["learnt_turns"]) == (36, 35)
    task = calls[0].args[4]
    labels = [label for row in [*task.train_rows, *task.held_out_rows] for label in row["labels"]]
    assert done.figures["learnt_tokens"] == sum(label != -100 for label in labels) > 35
    # no opening is on both sides, at whatever depth
    sides = [{tuple(row["input_ids"][:6]) for row in rows} for rows in (task.train_rows, task.held_out_rows)]
    assert sides[1] and not sides[0] & sides[1]


def test_last_learns_only_completions(chain, tmp_path):
    done = run(chain, tmp_path / "last", conversations(), "sft.turns=last")
    assert (done.figures["assistant_turns"], done.figures["learnt_turns"]) == (36, 18)
    lengths = {1 + len(chain.tokenizer(text)["input_ids"]) for text in ("the fox is red .", "no .")}
    assert set(done.figures["answer_tokens"]) == lengths


def test_the_loss_is_a_mean_over_the_tokens_of_all_turns(chain, tmp_path):
    """Check the first step's loss against transformers' own, on the one row that is trained on."""
    from transformers import AutoModelForCausalLM

    rows = [talk(ASKED[0], 3), talk(ASKED[1], 2)]
    done = run(chain, tmp_path / "loss", rows, "sft.per_device_train_batch_size=1", "sft.gradient_accumulation_steps=1")
    model = AutoModelForCausalLM.from_pretrained(chain.root / "base/model").eval()
    losses = []
    for row in rows:
        messages = row["messages"]
        learnt = list(range(1, len(messages) - 1, 2))
        demonstration = parse_demonstration(
            {"prompt": messages[:-1], "completion": messages[-1]["content"], "learnt": learnt}
        )
        encoded = encode_demonstrations(
            chain.tokenizer, [demonstration], names=["x"], max_length=96, on_too_long="error", section="sft"
        )
        losses.append(plain_loss(model, encoded.rows[0]))
    assert min(abs(done.rows("metrics.jsonl")[0]["loss"] - loss) for loss in losses) < 1e-4


def plain_loss(model, row: dict) -> float:
    """Return the mean cross-entropy of a row's labels."""
    import torch

    logprobs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    terms = [logprobs[place - 1, label].item() for place, label in enumerate(row["labels"]) if label != -100]
    return -sum(terms) / len(terms)


def test_a_template_that_changes_earlier_turns_is_named(chain, tmp_path):
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "base" / "model").mkdir(parents=True, exist_ok=True)
        source = chain.root / "base" / "model" / name
        (tmp_path / "base" / "model" / name).write_bytes(source.read_bytes())
    chain.tokenizer.save_pretrained(tmp_path / "base" / "model")
    template = tmp_path / "base" / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ eos_token }}", ""))
    done = run(chain, tmp_path / "apart", [talk(opening, 2) for opening in ASKED], inputs={"base": tmp_path / "base"})
    assert f"the chat template of {tmp_path / 'base' / 'model'} writes earlier answers otherwise" in done.said
    assert "6 earlier answers have rows of their own (the first: " in done.said
    assert "demonstrations: 12 rows, " in done.said and "12 assistant turns, all learnt" in done.said


def test_evaluation_takes_the_conversations_that_sft_holds_out(chain, tmp_path, monkeypatch):
    import stages.sft
    from stages.evaluation.prompts import split_demonstrations

    calls = spy(monkeypatch, stages.sft, "load_demonstrations")
    run(chain, tmp_path / "sft", conversations())
    held_out = calls[0].result.shown
    lines = (tmp_path / "sft.jsonl").read_text().splitlines()
    from data.source import Source
    from data.sources import load

    demonstrations = load("demonstrations", Source(tmp_path / "sft.jsonl"))
    assert len(demonstrations) == len([json.loads(line) for line in lines])
    _, held = split_demonstrations(demonstrations, 0.3)
    keys = {conversation_key(demonstrations[i].prompt) for i in held}
    assert {conversation_key(prompt) for prompt in held_out} <= keys
