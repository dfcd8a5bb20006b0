"""Processes, device mesh, FSDP2 and recomputation."""
