"""Measured hyperparameters, one file per model."""
