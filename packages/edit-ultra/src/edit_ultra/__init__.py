"""UltraEdit: facts written from one gradient (arXiv 2505.14679)."""
