"""Code that is copied into model folders and runs there, inside Transformers; nothing of the package imports it.

May import `math`, `typing`, `torch` and `transformers` only; `weights/checkpoint.py` copies the file.
"""
