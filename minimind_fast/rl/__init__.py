"""Reinforcement: answers of the model itself, and what they are worth.

May import `training`, `infer` and `data`; `train/grpo.py` calls it.
"""
