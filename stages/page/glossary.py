"""Explain the words of the report, a sentence each, and only those that a page uses."""

WORDS = (
    ("", "Policy", "A language model, seen as the thing that chooses each next token of a response."),
    ("base", "Base model", "The language model before it was taught to respond to prompts."),
    ("", "SFT", "Supervised fine-tuning: the base model after it imitated demonstrations, from which the other "
     "policies start."),
    ("rm", "Reward model", "A model that scores a response, trained on which of two responses people preferred."),
    ("rm", "Score", "The reward model's value of a response; demonstrations score 0 on average."),
    ("held_out", "Held-out reward model", "A second reward model of another seed, which no policy was trained on."),
    ("kept", "Kept judge", "A reward model that learned from rankings which train nothing else, so that nothing climbs "
     "it."),
    ("judges", "Climbed", "A policy that was trained on a judge's score, or selected by it, has climbed this judge."),
    ("ppo", "PPO", "Proximal policy optimisation, which raises the score in small steps and penalises moving away "
     "from SFT."),
    ("ppo", "Episode", "One prompt, one sampled response and its reward, from which PPO learns."),
    ("ppo", "ptx", "Pretraining text that is mixed into PPO's updates, so that the policy does not forget it."),
    ("dpo", "DPO", "Direct preference optimisation, which learns from the same preferences without a reward model."),
    ("best_of_n", "Best of n", "The one of n SFT samples that the reward model scores highest; nothing is trained."),
    ("gold", "Gold", "The embedded world's own measure of a response, from 0 to 1, which nothing is trained on."),
    ("gold", "Held-out tasks", "Tasks of evaluation prompts that do not occur in training data, in any words."),
    ("win_rate", "Win rate", "The share of prompts on which the judge prefers a policy's response to SFT's, where a "
     "tie counts as half."),
    ("", "KL", "How far a policy has moved from SFT: the mean log-ratio of the probabilities of its responses, in "
     "nats."),
    ("", "Nat", "The unit of information to the base e; 1 nat is about 1.44 bits."),
    ("perplexity", "Perplexity", "The number of tokens among which a model is undecided on average; lower is better."),
    ("", "Token", "A piece of text, a word or a part of one, that models read and write."),
    ("", "EOS", "The token that ends a response; a response without it was cut off at the length limit."),
    ("", "Greedy response", "The response that takes the most likely token at each position, instead of sampling."),
    ("over", "Over-optimisation", "A score that rises while what it should measure does not."),
    ("over", "Rank correlation", "How well two numbers agree on an order: 1 is the same order, −1 the reverse."),
    ("", "Standard error (s.e.)", "How far an estimate is from the true value in a typical experiment."),
    ("", "95\u00a0% interval", "A range that would contain the true value in 95 of 100 such experiments."),
    ("rm", "Calibration error (ECE)", "How far the reward model's confidence is from how often it is correct."),
    ("rm", "K", "The number of responses to a prompt that a labeler ranked at once."),
    ("rounds", "Round", "Collecting labels of what the newest policy answers, and training on all labels so far."),
    ("adapter", "Adapter", "Small matrices that are trained in place of the model's own weights."),
)  # fmt: skip
"""(what a page must contain to need the word, "" for every page; the word; its meaning)."""


def glossary(topics: set[str]) -> list[tuple[str, str]]:
    """Return the words that a page uses.

    Args:
        topics: The policies on the page, and "gold", "rm", "held_out", "kept", "judges",
            "win_rate", "perplexity", "over", "rounds" and "adapter" where the page covers them.

    Returns:
        (word, meaning) of each, in alphabetical order.
    """
    used = [(word, meaning) for topic, word, meaning in WORDS if not topic or topic in topics]
    return sorted(used, key=lambda item: item[0].lower())
