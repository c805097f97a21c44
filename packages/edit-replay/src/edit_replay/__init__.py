"""Replay: facts that were edited earlier join later batches, so that they are not overwritten."""
