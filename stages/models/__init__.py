"""The roles of a language model in RLHF: policy, ref_policy, reward_model, value_model."""
