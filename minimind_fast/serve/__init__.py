"""The parts of `minimind-fast serve`."""
