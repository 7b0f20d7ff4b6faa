"""Measure the reward model against trl 1.16's RewardTrainer (`make bench BENCH=rm`; see
preferences.py).
"""

import sys

import preferences

if __name__ == "__main__":
    sys.exit(preferences.main("rm"))
