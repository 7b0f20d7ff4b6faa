"""Score responses: the interface of a reward, and what implements it."""
