"""Go on in rounds: the next experiment from what people gave, and people who are simulated."""
