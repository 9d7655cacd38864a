"""What we are measured against: MiniMind's eager loop, Liger's kernels, other people's mixtures of experts."""
