"""Commands beside the stages: chat, doctor, memory estimates."""
