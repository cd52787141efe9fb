"""The settings of `fit` and `predict`: each option once, with its default, limits and help text."""
