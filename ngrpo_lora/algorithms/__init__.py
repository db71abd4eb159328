"""Training objectives, one file each; the file's name is the algorithm's (`algorithm.name`).

A file holds `Config`, its settings, and `Algorithm`, with the four methods of `_base.Algorithm`.
"""
