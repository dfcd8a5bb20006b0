"""Saving, committing, resuming, and starting from other weights, in PyTorch's distributed checkpoint format (DCP)."""
