"""Turn a task's rows into prompts and responses by wordings, with examples before them if asked.

`{premise, hypothesis, label}` is a row of a task, not a demonstration. A file of wordings says how
a prompt and a response are written from it (`wordings.py`, `fields.py`), `rows.py` applies one
wording or each to a row, and `shots.py` draws the rows that are shown before it.
"""
