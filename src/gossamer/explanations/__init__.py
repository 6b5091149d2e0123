"""One prediction: which attention links carry it, why each of them is open, and what each of them writes."""
