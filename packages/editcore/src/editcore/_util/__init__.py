"""Helpers for files, folders, paths, locks and memory.

They are private to this repository. Plugins that write run directories find such helpers in :mod:`editcore.runs`.
"""
