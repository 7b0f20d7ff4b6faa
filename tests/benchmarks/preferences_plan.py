"""Say what the preference benchmarks (preferences.py) measure: rows, rankings, necessary work."""

import random
from dataclasses import dataclass

from ppo_models import FIRST_WORD, SHAPES, parameters

ON_GPU = {"gpu-135M": "135M", "gpu-1.3B": "1.3B"}
"""Model of `plan` that runs on the GPU → its shape."""
PROMPTS = {"cpu": {2: 8, 4: 2, 9: 1}, "cuda": {2: 32, 4: 16, 9: 8}}
"""Device → K → prompts of a step."""
PEERS = {"pairs": "trl", "rows": "K padded rows"}
"""Peer → its name in a line; trl's gets its version."""
MICRO = {"cpu": (1, 2, 4, 12), "cuda": (24, 48, 96)}
"""Device → micro-batches to try for trl, in pairs."""
MICRO_OF_ROWS = (1, 2, 4, 8, 16, 32)
"""Micro-batches to try for K padded rows, in prompts."""
GROWTH = 4
"""Prompts of a step for measuring the growth with K."""
LENGTHS = {"1:1": (128, 128), "4:1": (512, 128), "1:4": (128, 512)}
"""Ratio → maximum tokens of a prompt and of a response."""


def shape_of(model: str) -> str:
    """Return the name in SHAPES of a model of `plan`."""
    return ON_GPU.get(model, model)


@dataclass(frozen=True)
class Row:
    """Describe what one line measures."""

    bench: str
    """rm or dpo."""
    model: str
    """A name of SHAPES or ON_GPU."""
    k: int = 9
    """Responses of each prompt."""
    p_to_r: str = "1:1"
    """Length of prompts to that of responses; a key of LENGTHS."""
    lengths: str = "variable"
    """fixed or variable."""
    measure: str = "step"
    """step or growth."""
    law: bool = False
    """Whether this is a growth law, which is skipped when the time is up."""
    peer: str = "pairs"
    """Whom it compares us with; a key of PEERS."""

    @property
    def name(self) -> str:
        """Return the name of the row for --only and messages."""
        return self.workload + ("/rows" if self.peer == "rows" else "")

    @property
    def workload(self) -> str:
        """Return what is computed, the same for both peers."""
        return f"{self.model}/{self.measure}/k{self.k}/{self.p_to_r}/{self.lengths}"

    @property
    def device(self) -> str:
        """Return the device that the row runs on."""
        return "cuda" if self.model in ON_GPU else "cpu"

    @property
    def dtype(self) -> str:
        """Return the data type of products."""
        return {"cpu": "float32", "cuda": "bfloat16"}[self.device]

    @property
    def shape(self) -> str:
        """Return the name in SHAPES."""
        return shape_of(self.model)

    @property
    def prompts(self) -> int:
        """Return the number of prompts of a step."""
        return PROMPTS[self.device][self.k]

    def rankings(self, seed: int, prompts: int | None = None) -> list[dict]:
        """Draw random rankings.

        Args:
            seed: Seed of the random numbers.
            prompts: Number of prompts; None: as many as in a step.

        Returns:
            {"prompt", "responses", "ranks"} of each prompt, as token ids. Variable lengths are
            uniform from a quarter of the maximum.
        """
        draw = random.Random(f"{self.workload} {seed}")
        vocabulary = SHAPES[self.shape]["vocab_size"]

        def text(longest: int) -> list[int]:
            size = longest if self.lengths == "fixed" else draw.randint(longest // 4, longest)
            return [draw.randrange(FIRST_WORD, vocabulary) for _ in range(size)]

        prompt, response = (n // 8 if self.model == "quick" else n for n in LENGTHS[self.p_to_r])
        return [
            {
                "prompt": text(prompt),
                "responses": [text(response) for _ in range(self.k)],
                "ranks": draw.sample(range(1, self.k + 1), self.k),
            }
            for _ in range(prompts or self.prompts)
        ]


def plan(bench: str, models: list[str]) -> list[Row]:
    """Return the rows of each model: its ratios by peer, then its growth law."""
    shapes = {
        "rm": [(9, "1:1", "fixed"), (9, "1:1", "variable"), (9, "4:1", "variable"), (9, "1:4", "variable"),
               (4, "1:1", "variable"), (4, "4:1", "variable"), (2, "1:1", "variable"), (2, "4:1", "variable")],
        "dpo": [(2, "1:1", "fixed"), (2, "1:1", "variable"), (2, "4:1", "variable"), (9, "1:1", "variable")],
    }[bench]  # fmt: skip
    rows = []
    for model in models:
        for peer in PEERS:
            rows += [Row(bench, model, *shape, peer=peer) for shape in shapes]
        rows.append(Row(bench, model, lengths="fixed", measure="growth", law=True))
    return rows


def tokens(rankings: list[dict]) -> int:
    """Count the tokens of the rankings, each prompt once."""
    return sum(len(r["prompt"]) + sum(map(len, r["responses"])) for r in rankings)


def tokens_read(side: str, bench: str, rankings: list[dict], packed: bool = True) -> int:
    """Count the tokens, without padding, that a side's models read in a step.

    Both sides must read the same prompts and responses, none of them cut off: so this is compared
    with what went through their models.

    Args:
        side: ours, or a key of PEERS.
        bench: "rm", or "dpo", in which the reference reads them too.
        rankings: The rankings of the step.
        packed: Whether our side reads a prompt once for all its responses.
    """
    total = 0
    for r in rankings:
        prompt, responses = len(r["prompt"]), [len(x) for x in r["responses"]]
        if side == "pairs":  # each response in a pair with each other one
            total += (len(responses) - 1) * sum(prompt + n for n in responses)
        else:
            total += (1 if side == "ours" and packed else len(responses)) * prompt + sum(responses)
    return total * (2 if bench == "dpo" else 1)


def necessary_flops(bench: str, shape: dict, rankings: list[dict]) -> float:
    """Count the FLOPs of a step that cannot be avoided.

    Only real tokens count, each prompt counts once, and attention is causal. Forward and backward
    together take three times a forward pass. DPO also needs logits at response tokens and the
    reference's forward pass.

    Args:
        bench: "rm" or "dpo".
        shape: Shape of the model.
        rankings: The rankings of the step.

    Returns:
        FLOPs.
    """
    weights, passes = parameters(shape), 4 if bench == "dpo" else 3
    flops_per_attended = 4 * shape["hidden_size"] * shape["num_hidden_layers"]
    trunk = head = 0.0
    for r in rankings:
        prompt, responses = len(r["prompt"]), [len(x) for x in r["responses"]]
        attended = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        trunk += 2 * weights["trunk"] * (prompt + sum(responses)) + flops_per_attended * attended
        if bench == "dpo":
            head += 2 * weights["unembedding"] * sum(responses)
    return passes * (trunk + head)
