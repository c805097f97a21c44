"""A plugin package for tests: an editor, two backends, extensions that judge, record and fail, and data
sets."""
