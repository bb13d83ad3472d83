"""Predicting the memory of a training run."""
