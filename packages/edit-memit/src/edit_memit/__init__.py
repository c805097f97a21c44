"""MEMIT: mass-editing memory in a transformer (arXiv 2210.07229)."""
