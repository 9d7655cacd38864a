"""Learning from preferences and rewards: answers of the model itself or of the data, and what they are worth.

May import `training`, `infer`, `weights` and `data`; `train/dpo.py` and `train/grpo.py` call it.
"""
