"""A plugin package for tests: an editor, two backends, and extensions that judge, record and fail."""
