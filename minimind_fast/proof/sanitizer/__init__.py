"""What a kernel does to memory, watched in Triton's interpreter: who wrote and read each element, in any order of programs.

Run by the tests and by `make proof`, with TRITON_INTERPRET=1. May import the proof's cases and Triton; of Triton's and
PyTorch's private names only what `interpreter` and `virtual` hold.
"""
