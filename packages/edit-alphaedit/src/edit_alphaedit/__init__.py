"""AlphaEdit: null-space constrained knowledge editing (arXiv 2410.02355)."""
