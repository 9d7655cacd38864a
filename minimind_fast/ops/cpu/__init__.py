"""Ops for a CPU: attention in rectangles, fused passes, few matmul shapes. May import `ops`; only `ops` calls it."""
