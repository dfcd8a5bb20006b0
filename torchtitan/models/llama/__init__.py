"""Llama 3.1: shapes, rotary embedding, attention kernels, and the model itself."""
