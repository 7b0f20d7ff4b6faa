"""Turn logs and files of prompts into clean parts: InstructGPT's step 0, `rlhf data prepare`."""
