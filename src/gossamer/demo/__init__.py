"""The smallest complete example: two-digit addition, from training a model from scratch to its algorithm in words."""
