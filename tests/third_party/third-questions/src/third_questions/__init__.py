"""A data set with questions of its own, and an evaluator that asks them."""
