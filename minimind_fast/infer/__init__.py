"""From prompts to tokens: KV cache, sampling, generation, a batch with joining and leaving rows, scoring.

May import `model`, `ops` and `data`; `serve`, `rl` and commands call it.
"""
