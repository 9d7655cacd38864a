"""Learning from preferences and rewards.

May import `training`, `infer`, `weights` and `data`; `train/dpo.py` and `train/grpo.py` call it.
"""
