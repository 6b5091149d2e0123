"""Post-training under a constraint: text, objective, trainer, the run as a whole."""
