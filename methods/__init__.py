"""The published methods in pure PyTorch: a file per method, tensors in and tensors out.

Nothing here knows Lightning, a model library, or files. `structure` describes a model; the other modules and folders
hold what acts on one.
"""
