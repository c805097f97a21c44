"""Evaluators, data sets and extensions that keep their contract, and others that break one clause each on purpose."""
