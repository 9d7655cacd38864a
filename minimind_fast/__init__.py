"""minimind_fast: train a tiny language model from nothing, at the speed of the machine.

Purpose: the names that users import.
Principle: `import minimind_fast as mm`; everything else lies one module deeper.
Properties: importing it starts nothing and needs no GPU.
"""

from minimind_fast import ops
from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.infer import generate as _generate  # noqa: F401  gives the model its `generate`
from minimind_fast.model import MiniMind
from minimind_fast.training.config import TrainConfig
from minimind_fast.weights.checkpoint import load_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "IGNORE_INDEX",
    "MiniMind",
    "ModelConfig",
    "Tokenizer",
    "TrainConfig",
    "load_pretrained",
    "ops",
    "save_pretrained",
]
