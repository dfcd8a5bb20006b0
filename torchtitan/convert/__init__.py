"""Weights in and out: Llama's .pth, Hugging Face's safetensors, and DCP checkpoints, one tensor at a time."""
