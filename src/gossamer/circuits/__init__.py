"""Circuits: tasks, scores, interventions and how well a circuit explains a behaviour."""
