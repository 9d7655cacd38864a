"""bfloat16 in tests: where the CPU multiplies it. Elsewhere it is emulated, which takes long and proves nothing more."""

import pytest
import torch

from minimind_fast.ops import precision

HAS_BF16 = torch.cuda.is_available() or precision.multiplies(torch.bfloat16)
# For a case in bfloat16 whose point is another one, such as a ZeRO stage: it stays, in float32.
HALF = "bfloat16" if HAS_BF16 else "float32"
needs_bf16 = pytest.mark.skipif(
    not HAS_BF16, reason="this CPU has no bfloat16 instructions: emulation proves nothing more"
)
