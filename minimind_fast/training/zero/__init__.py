"""Sharding: DeepSpeed's engine behind one class, and our options as its config.

May import `training`'s config and ranks, `model` and below; `setup`, the trainer and checkpoints call it.
"""
