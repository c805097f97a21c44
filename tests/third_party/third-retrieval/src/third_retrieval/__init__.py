"""Remembered statements in front of prompts, as an editor of editcore."""
