"""Making one model of several: a file per published method, and `files` for models that lie on disk.

`base` has what all mergers share; `election` what several use, as `methods.random` and `methods.selection` do.
"""
