"""The commands of `minimind-fast`, one per file.

They may import everything; only `cli.py` calls them.
"""
