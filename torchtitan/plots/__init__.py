"""Pictures of how a model trains, what it has learned, and the activity that it generates.

Functions from data to matplotlib figures, without pyplot and its global state. Nothing here needs torch.
"""
