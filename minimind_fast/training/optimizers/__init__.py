"""Optimizers that PyTorch does not bring: Muon, and how its matrices are shared among ranks. Only the engine calls them."""
