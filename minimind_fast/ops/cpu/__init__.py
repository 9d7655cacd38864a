"""CPU ops: attention in rectangles, fused passes, few matmul shapes. May import `ops`; only `ops` calls it."""
