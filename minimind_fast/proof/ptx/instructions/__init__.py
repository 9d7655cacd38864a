"""What each instruction does: one function a family, found by the whole spelling of an opcode.

`table.py` holds the table; the other files fill it when they are imported, which `decode.py` of the folder above does.
They import numpy, the lanes and the formats, and know nothing of Triton, of torch or of launches.
"""
