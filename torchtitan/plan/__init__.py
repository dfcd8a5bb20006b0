"""What a run will take, worked out before it takes it: memory, time, and the recomputation that fits.

Only `resolve` needs torch.
"""
