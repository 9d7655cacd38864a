"""From prompts to tokens: KV cache, sampling, whole answers, a batch whose rows come and go.

May import `model` and `ops`; `serve`, `rl` and commands call it.
"""
