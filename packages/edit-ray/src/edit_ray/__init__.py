"""Executor ``ray`` of editcore."""
