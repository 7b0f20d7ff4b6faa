"""Keep the tests quiet and offline by the environment that `rlhf` sets before its imports.

The copies that transformers makes of models' own code go to a temporary folder.
"""

import os
import sys
import tempfile
from pathlib import Path

from pipeline.launch.environment import set_environment

MODULES = tempfile.TemporaryDirectory(prefix="rlhf-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
set_environment({})
sys.path.insert(0, str(Path(__file__).parent))  # remote_model
