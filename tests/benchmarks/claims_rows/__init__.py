"""Declare the rows of `make claims`: what each measures, what a paper says of it, and its rule."""
