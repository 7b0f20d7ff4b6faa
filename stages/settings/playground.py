"""Declare the section playground: the page where people talk to the policies."""

from pydantic import field_validator

from pipeline.config.section import Section, setting

KINDS = (
    "generation",
    "open_qa",
    "brainstorming",
    "chat",
    "rewrite",
    "summarization",
    "classification",
    "closed_qa",
    "extraction",
    "other",
)
"""What people ask for (InstructGPT, table 1)."""
CONSENT = (
    "If you agree, this conversation, which answer you find better, and your corrections are kept and may be used to "
    "train models. Write nothing that others must not read. You can delete a conversation at any time."
)


class PlaygroundSettings(Section):
    """Choose who answers on the page of `rlhf playground`, and how.

    Nothing here is part of a stage's fingerprint.
    """

    policies: list[str] | None = setting(
        None, "stages whose policies answer, or folders of models; null: sft, ppo and dpo, as far as published"
    )
    reward_model: str | None = setting(
        "rm", "what scores the answers: rm (where that is published), or a folder of a reward model; null: nothing"
    )
    engine: str | None = setting(
        None, "what samples: transformers or vllm (whose answers come whole); null: as in evaluate.rollout"
    )
    temperature: float = setting(1.0, "sampling temperature that the page starts with; 0: the likeliest token", ge=0)
    top_p: float = setting(1.0, "top-p that the page starts with", gt=0, le=1)
    top_k: int = setting(0, "top-k that the page starts with; 0: all tokens", "tokens", ge=0)
    max_tokens: int | None = setting(
        None, "longest answer that the page starts with; null: evaluate.response_length", "tokens", ge=1
    )
    max_tokens_limit: int = setting(2048, "longest answer that anybody may ask for", "tokens", ge=1)
    max_queue: int = setting(
        16, "answers that may wait for a device; beyond them people are asked to come back", "answers", ge=1
    )
    max_per_user: int = setting(2, "requests that one person may have open at a time", "requests", ge=1)
    kinds: list[str] = setting(list(KINDS), "what a person can say the prompts are for")
    consent: str = setting(CONSENT, "text that the page shows above the switch that lets conversations be kept")
    host: str = setting("127.0.0.1", "address to listen on; 127.0.0.1: only this machine")
    port: int = setting(0, "port to listen on; 0: the one of last time if it is free, otherwise any", ge=0, le=65535)

    @field_validator("policies")
    @classmethod
    def some_policy(cls, value: list[str] | None) -> list[str] | None:
        """Refuse an empty list and a policy that is named twice."""
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("name at least one policy, and each once; for example [sft, ppo]")
        return value

    @field_validator("engine")
    @classmethod
    def known_engine(cls, value: str | None) -> str | None:
        """Refuse an engine that does not exist."""
        if value not in (None, "transformers", "vllm"):
            raise ValueError("use transformers or vllm")
        return value
