"""Metrics of a finished run: loss, KL to the dense model, open links, the top-k baseline."""
