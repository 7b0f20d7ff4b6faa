"""The formula sheet: pure functions of tensors; imports torch alone. Shapes: B rows, R response tokens, N pairs."""
