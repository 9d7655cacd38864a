"""From text to batches: tokenizer, token cache, chats and pairs, packing, samples.

May import `config`; stages, commands and `rl` call it.
"""
