"""The commands of `minimind-fast`, one a file.

They may import everything; only `cli.py` calls them.
"""
