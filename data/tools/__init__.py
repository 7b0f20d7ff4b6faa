"""Look at data and write them in other forms: `rlhf data preview | stats | convert | export`.

Each command is one module with a function `run`. Rows are read as training reads them
(`data/sources.py`), one by one, and with a config as its sections ask.
"""
