"""ROME: rank-one model editing (arXiv 2202.05262), with the stable key of r-ROME (arXiv 2403.07175)."""
