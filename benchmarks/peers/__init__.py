"""What we compare with: MiniMind's eager loop, Liger's kernels, other MoE implementations."""
