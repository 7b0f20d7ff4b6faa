"""Run stages: configuration, artifacts, checkpoints, the plan, tracking. It knows nothing of RLHF.

In Python code, `from pipeline import load_experiment, run` does what `rlhf run` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import load_experiment, run

__all__ = ["load_experiment", "run"]


def __getattr__(name: str) -> Any:
    """Import the two functions when they are first used: importing the package stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import api

    return getattr(api, name)
