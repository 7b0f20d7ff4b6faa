"""The reward model against trl 1.16's RewardTrainer. `make bench BENCH=rm`; all of it is in preferences.py."""

import sys

import preferences

if __name__ == "__main__":
    sys.exit(preferences.main("rm"))
