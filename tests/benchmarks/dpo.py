"""Measure DPO against trl 1.16's DPOTrainer (`make bench BENCH=dpo`; see preferences.py)."""

import sys

import preferences

if __name__ == "__main__":
    sys.exit(preferences.main("dpo"))
