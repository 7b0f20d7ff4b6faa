"""Define the mathematics of training as pure functions of tensors; they import torch only."""
