"""Compare gradients of models in tests."""

from stages.models.sharding import to_float
from stages.training.readings import read_all
from stages.training.trainee import cosine, dot_product, total_norm


def gradient_cosine(one, other) -> float:
    """Return the cosine between two lists of gradients, as an update computes it."""
    product = dot_product(one, other)
    return cosine(product.sum(read_all(product.terms)), to_float(total_norm(one)) * to_float(total_norm(other)))
