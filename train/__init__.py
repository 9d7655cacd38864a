"""The training stages, one script each; imported as `minimind_fast.stages`, run as `deepspeed train/pretrain.py`."""
