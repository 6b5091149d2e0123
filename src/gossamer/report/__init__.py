"""Result records as figures and as a page; nothing here loads a model."""
