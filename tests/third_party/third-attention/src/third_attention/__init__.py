"""Gradient steps on one attention output and its bias, as an editor of editcore."""
