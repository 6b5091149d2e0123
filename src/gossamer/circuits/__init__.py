"""Circuits: tasks, scores, interventions and metrics of how well a circuit explains a behaviour."""
