"""MiniMind's own data: what its trainers do to a row, and its published sets by name.

Plain functions and tables. They import `errors` at most; the readers of chats and pairs, the stages and `plan` use them.
"""
