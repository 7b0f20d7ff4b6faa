"""Tests stay quiet and offline: `rlhf`'s environment without a Hub id, before any library is imported; and the copies
that transformers makes of models' own code go to a folder that is removed."""

import os
import sys
import tempfile
from pathlib import Path

from pipeline.launch.environment import set_environment

MODULES = tempfile.TemporaryDirectory(prefix="rlhf-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
set_environment({})
sys.path.insert(0, str(Path(__file__).parent))  # remote_model
