"""Write a folder with tasks of lm-eval and their data."""

import json
from pathlib import Path

FACTS = """\
task: tiny_facts
dataset_path: json
dataset_kwargs:
  data_files: {test: facts.jsonl}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""
WORDS = """\
task: tiny_words
dataset_path: json
dataset_kwargs:
  data_files: {test: words.jsonl}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["?"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
metadata: {version: 1.0}
"""
GROUP = """\
group: tiny_all
task: [tiny_facts, tiny_words]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""
CODE = FACTS.replace("tiny_facts", "tiny_code") + "unsafe_code: true\n"
HUB = (
    FACTS.replace("tiny_facts", "tiny_hub")
    .replace("dataset_path: json", "dataset_path: nobody/nothing")
    .replace("dataset_kwargs:\n  data_files: {test: facts.jsonl}\n", "")
)
COLORS = ["red", "blue", "old", "kind"]


def write_tasks(folder: Path) -> Path:
    """Write the tasks, and return the folder."""
    folder.mkdir(parents=True)
    for name, text in {"facts": FACTS, "words": WORDS, "all": GROUP, "hub": HUB, "code": CODE}.items():
        (folder / f"{name}.yaml").write_text(text)
    facts = [
        {"question": f"what color is the {'old ' * i}fox ?", "choices": COLORS[:3], "answer": i % 3} for i in range(6)
    ]
    words = [{"question": f"what is {color} ?", "answer": f"the {color}"} for color in COLORS]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    return folder
