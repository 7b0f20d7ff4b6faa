"""Write what evaluate publishes: responses.jsonl, and rows of JSON in general."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.judging import preference_of
from stages.evaluation.results import Measured


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write a file with one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def response_rows(
    prompts: Sequence, clusters: Sequence[str], leaked: Sequence[bool], measured: dict[str, Measured]
) -> Iterator[dict]:
    """Yield the rows of responses.jsonl: each policy's samples for each prompt, with their scores.

    Args:
        prompts: P prompts, strings or messages.
        clusters: The cluster of each prompt.
        leaked: Whether training data sets each prompt's task too; written where there is gold.
        measured: What was measured of each policy.

    Yields:
        {policy, prompt, sample, response, finished, score, length, raw_score?, judges?, compared?,
        gold?, cluster?, known_task?}. `score` is the reward model's; `judges` has the scores of the
        other judges, except gold, by name; `compared` what a judge that compares made of it and
        SFT's sample of the same number: 1 is won, ½ a tie.
    """
    for name, of_policy in measured.items():
        own = of_policy.reward_model_scores
        others = {judge: scores for judge, scores in of_policy.scores.items() if judge != REWARD_MODEL}
        for i, prompt in enumerate(prompts):
            for k, response in enumerate(of_policy.responses[i]):
                row = {
                    "policy": name,
                    "prompt": prompt,
                    "sample": k,
                    "response": response,
                    "finished": of_policy.finished[i][k],
                    "score": own[i][k] if own is not None else None,
                    "length": of_policy.lengths[i][k],
                }
                if of_policy.raw_scores is not None:
                    row["raw_score"] = of_policy.raw_scores[i][k]
                if others:
                    row["judges"] = {judge: scores[i][k] for judge, scores in others.items()}
                if of_policy.compared:
                    row["compared"] = {
                        judge: preference_of(*rows[i][k]) if k < len(rows[i]) else None
                        for judge, rows in of_policy.compared.items()
                    }
                if of_policy.gold is not None:
                    row |= {"gold": of_policy.gold[i][k], "cluster": clusters[i], "known_task": leaked[i]}
                yield row
