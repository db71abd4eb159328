"""Model families, one file each; the file's name is `model.family`.

A file holds `Family` with the attributes and methods of `_base.BaseFamily`. Everything else is diffusers'.
"""
