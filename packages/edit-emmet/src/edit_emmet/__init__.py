"""EMMET: equality-constrained mass model editing (arXiv 2403.14236)."""
