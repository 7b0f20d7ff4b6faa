"""Declare the scorer `url:`: a server that scores."""

import urllib.parse
from typing import Literal

from pipeline.config.section import setting
from stages.settings.scorers.common import ScorerSection, missing_key

Protocol = Literal["rlhf", "openrlhf", "slime", "vllm"]
"""How a server is asked; each is a line of `stages.scorers.url_protocols.PROTOCOLS`."""

ONE_A_REQUEST = ("slime", "vllm")
"""Protocols that have one response in a request."""

SECRET_NAMES = {"key", "api_key", "apikey", "api-key", "token", "access_token", "secret", "password"}
"""Parameters of an address, or fields of a request, that hold what must not reach artifacts."""


class UrlScorer(ScorerSection):
    """Score by a server."""

    url: str = setting(..., "address of a server that scores, as http://127.0.0.1:80/score (stages/scorers/README.md)")
    protocol: Protocol = setting(
        "rlhf",
        "how the server is asked: rlhf (as `rlhf serve-reward` answers), openrlhf (remote_rm_url), slime (rm_url) or "
        "vllm (/classify of a reward model)",
    )
    label_key: str | None = setting(
        None, "openrlhf, slime: key of the rows of data that is sent as the label; null: `label`, where a row has it"
    )
    served_model: str | None = setting(None, "vllm: name of the model, where the server has several")
    batch_size: int = setting(32, "the most responses in a request (slime, vllm: always 1)", "responses", ge=1)
    concurrency: int = setting(4, "the most requests at a time, of each process of a run", "requests", ge=1)
    timeout: float = setting(60.0, "the longest that an answer may take, connecting included", "seconds", gt=0)
    retries: int = setting(
        3, "how often a request that failed is sent again, after 1, 2, 4, … seconds (at most 30)", ge=0
    )
    on_failure: Literal["stop", "drop"] = setting(
        "stop",
        "what to do when no valid scores come: stop (save, exit code 3), or drop: this update goes on without this "
        "scorer, which needs another scorer that stays",
    )
    key_env: str | None = setting(
        None,
        "environment variable with a key, which is sent as `Authorization: Bearer KEY`",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    record: bool = setting(
        True,
        "keep the scores beside the checkpoints, so that the same response is asked once and a resumed run gets the "
        "scores that it had",
    )

    def default_name(self) -> str:
        """Return "url"."""
        return "url"

    def may_drop(self) -> bool:
        """Return whether an update may go on without this scorer."""
        return self.on_failure == "drop"

    def problems(self, key: str) -> list[str]:
        """Return a line for each mistake in the address, and for settings without effect."""
        lines = [f"{key}.url: {what}" for what in address_problems(self.url)]
        if self.served_model is not None and self.protocol != "vllm":
            lines.append(f"{key}.served_model: has no effect with protocol {self.protocol}; leave it out")
        if self.label_key is not None and self.protocol not in ("openrlhf", "slime"):
            lines.append(
                f"{key}.label_key: has no effect with protocol {self.protocol}; leave it out"
                + (" (the server gets whole rows)" if self.protocol == "rlhf" else "")
            )
        return lines

    def missing(self, key: str) -> list[str]:
        """Return a line if the environment has no key."""
        return missing_key(key, self.key_env)


def address_problems(url: str) -> list[str]:
    """Return what is wrong with the address of a server; nothing of a password is in the lines.

    Args:
        url: The address.
    """
    example = "give one as http://127.0.0.1:8000/score"
    if url != url.strip() or any(ord(letter) <= 32 for letter in url):
        return [f"the address contains blanks; {example}"]
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        return [f"is not an address ({error}); {example}"]
    if parts.username is not None or parts.password is not None:
        return ["the address contains credentials, which would reach artifacts; name a variable with key_env"]
    secrets = SECRET_NAMES & {name.lower() for name, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True)}
    if secrets:
        return [f"the address contains {min(secrets)}=…, which would reach artifacts; name a variable with key_env"]
    if parts.scheme not in ("http", "https"):
        return [f"{url!r} is not an address of http or https; {example}"]
    if not parts.hostname or port == 0:
        return [f"{url!r} names no {'port' if parts.hostname else 'host'}; {example}"]
    if parts.fragment:
        return [f"{url!r} has a fragment (#{parts.fragment}), which no server sees; leave it out"]
    return []
