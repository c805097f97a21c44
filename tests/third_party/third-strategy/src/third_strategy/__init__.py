"""A strategy of replay, for editcore: each fact has its turn."""
