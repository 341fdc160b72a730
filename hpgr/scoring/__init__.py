"""Scores for any candidates of any users, by the same model functions as training and evaluation. No Ray."""
