"""Published hyperparameters, one file per model."""
