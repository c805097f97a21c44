"""Edited statements put before similar prompts: the baseline that changes no weight."""
