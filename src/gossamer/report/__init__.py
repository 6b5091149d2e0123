"""Figures and HTML pages of result records; nothing here loads a model."""
