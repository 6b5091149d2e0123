"""Post-training under a constraint: text, constraints, multiplier, trainer."""
