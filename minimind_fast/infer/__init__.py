"""From prompts to tokens: KV cache, sampling, whole answers, a batch whose rows come and go, scores of given texts.

May import `model`, `ops` and `data`; `serve`, `rl` and commands call it.
"""
