"""Explain one prediction: which attention links carry it, why each is open, and what each writes."""
