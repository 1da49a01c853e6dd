"""Edits of one weight, with a slot of their own for every fact that is deleted by itself."""
