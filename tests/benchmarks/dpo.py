"""DPO against trl 1.16's DPOTrainer. `make bench BENCH=dpo`; all of it is in preferences.py."""

import sys

import preferences

if __name__ == "__main__":
    sys.exit(preferences.main("dpo"))
