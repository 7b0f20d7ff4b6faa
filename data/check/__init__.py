"""Check data before anything trains on it: `rlhf data check [FILE] [-c CONFIG]`.

The report shows kind and forms, lengths, duplicates, what rankings hold, prompts that other files
share word by word or nearly so, what a length limit would do, and every error that reading would
raise. Reader and token counts are those of training.
"""
