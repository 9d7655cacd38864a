"""What index tensors hold where no memory holds the tensors.

Purpose: a few programs of a launch run on made-up data; integers must be such that they take the usual way.
Principle: by the name of the kernel's parameter: experts take turns, documents are equally long, every target counts.
Properties: an index tensor that is not in the table is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DOCUMENTS = 4  # of a pack, as the records' cases draw them


def held(name: str, at: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    """What an index tensor holds at these elements.

    Args:
        name: the kernel's parameter.
        at: elements, any shape.
        sizes: the kernel's integers by name; "slots" beside them where it takes an order.

    Raises:
        LookupError: nothing is known of this parameter.
    """
    E, top_k, slots = sizes.get("E", 1), sizes.get("TOP_K", 1), sizes.get("slots", 0)
    made: dict[str, Callable[[], np.ndarray]] = {
        "positions_ptr": lambda: at % 1024,
        "targets_ptr": lambda: at % sizes["V"],
        "mask_ptr": lambda: np.ones_like(at),
        "valid_ptr": lambda: np.ones_like(at),
        "counts_ptr": lambda: np.where(at == E - 1, slots - (E - 1) * (slots // E), slots // E),
        "order_ptr": lambda: at,
        "inverse_ptr": lambda: at,
        "experts_ptr": lambda: (at // top_k + at % top_k) % E,
        "tile_counts_ptr": lambda: np.full_like(at, sizes["BLOCK_T"] * top_k // E),
        "load_ptr": lambda: np.full_like(at, sizes["BLOCK_T"] * top_k // E),
        "length_ptr": lambda: np.full_like(at, sizes["num_tokens"] // DOCUMENTS),
        "cu_ptr": lambda: at * (sizes["num_tokens"] // DOCUMENTS),
    }
    if name not in made:
        raise LookupError(f"{name} holds integers: say in {__name__} which")
    return made[name]()
