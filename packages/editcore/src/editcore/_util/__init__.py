"""Files, folders, paths, locks and memory: what any program needs.

Private to this repository. Plugins that write run directories find what they need in :mod:`editcore.runs`.
"""
