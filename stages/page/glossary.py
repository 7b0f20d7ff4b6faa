"""The words of the report, a sentence each; only those that the page uses. Pure."""

WORDS = (  # what must be there (a policy, "gold", "rm", "held_out", "adapter"; "" always), word, meaning
    ("", "Policy", "A language model seen as what chooses each next token of an answer."),
    ("base", "Base", "The language model before it was taught to answer."),
    ("", "SFT", "Supervised fine-tuning: base after it learned to imitate demonstrations; what the others start from."),
    ("rm", "Reward model", "A model that scores an answer, learned from which of two answers people preferred."),
    ("rm", "Score", "The reward model's number for an answer; demonstrations score 0 on average."),
    ("held_out", "Held-out reward model",
     "A second reward model of another seed, which no policy was trained to please."),
    ("ppo", "PPO", "Proximal policy optimisation: raises the score by small steps, with a penalty for leaving SFT."),
    ("ppo", "Episode", "One prompt, one sampled answer and its reward: what PPO learns from."),
    ("ppo", "ptx", "Pretraining text that is mixed into PPO's updates, so that the policy does not forget it."),
    ("dpo", "DPO", "Direct preference optimisation: learns from the same preferences without a reward model."),
    ("best_of_n", "Best of n", "The one of n SFT samples that the reward model scores highest; nothing is trained."),
    ("gold", "Gold", "The embedded world's own measure of an answer, 0 to 1, which nothing is trained on."),
    ("gold", "Held-out tasks", "Tasks of evaluation prompts that no training data set, in any words."),
    ("win_rate", "Win rate", "Share of prompts on which the judge prefers a policy's answer to SFT's; ties are half."),
    ("", "KL", "How far a policy has gone from SFT: the mean log-ratio of its answers' probabilities, in nats."),
    ("", "Nat", "The unit of information to the base e; 1 nat is about 1.44 bits."),
    ("perplexity", "Perplexity", "How many tokens a model hesitates between on average; lower is better."),
    ("", "Token", "A piece of text, a word or a part of one, that models read and write."),
    ("", "EOS", "The token that ends an answer; an answer without it was cut off at the length limit."),
    ("", "Greedy answer", "The likeliest token at each place, in place of a sample by chance."),
    ("over", "Over-optimisation", "A score that rises while what it stands for does not."),
    ("over", "Rank correlation", "How well the order by one number is the order by another: 1 the same, −1 reversed."),
    ("", "95\u00a0% interval", "A range that would hold the true value in 95 of 100 such experiments."),
    ("rm", "Calibration error (ECE)", "How far the reward model's confidence is from how often it is right."),
    ("rm", "K", "How many answers to a prompt a labeler ranked at once."),
    ("adapter", "Adapter", "Small matrices that are trained in place of the model's own weights."),
)  # fmt: skip


def glossary(there: set[str]) -> list[tuple[str, str]]:
    """Return the words that a page with these things uses.

    Args:
        there: Policies on the page, and "gold", "rm", "held_out", "win_rate", "perplexity", "over", "adapter" where
            it tells of them.

    Returns:
        (word, meaning), in alphabetical order.
    """
    found = [(word, meaning) for needs, word, meaning in WORDS if not needs or needs in there]
    return sorted(found, key=lambda item: item[0].lower())
