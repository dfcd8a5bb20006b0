"""Recordings -> tokens -> windows -> batches."""
