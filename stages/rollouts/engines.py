"""List the rollout engines by the names that `rollout.engine` takes."""

from collections.abc import Callable

from stages.rollouts.engine import EngineSpec, RolloutEngine
from stages.rollouts.transformers import TransformersEngine
from stages.rollouts.vllm import make_vllm

ENGINES: dict[str, Callable[[EngineSpec], RolloutEngine]] = {"transformers": TransformersEngine, "vllm": make_vllm}
