"""Evaluate a model on held-out images; `evaluate.run` is the `evaluate` stage."""
