"""A run: options, the loop, DeepSpeed, checkpoints, the log, losses.

May import everything below it (`model`, `data`, `weights`, `infer`); the stages in `train/` and `rl` call it.
"""
