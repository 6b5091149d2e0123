"""The smallest whole example: two-digit addition, from a model trained from scratch to the algorithm in words."""
