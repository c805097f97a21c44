"""MEMIT: mass-editing memory in a transformer (arXiv 2210.07229), and its form for sequences of batches."""
