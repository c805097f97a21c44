"""Hyperparameters, one file per model."""
