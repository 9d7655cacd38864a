"""The parts of `minimind-fast serve`: batching, requests, answers, routes, the page.

May import `infer` and what is below it; only `commands/serve.py` calls it.
"""
