"""Measurements of a model: losses, KL to the dense model, open links."""
