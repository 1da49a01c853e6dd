"""Frozen pretrained models behind one small interface, and where their files come from."""
