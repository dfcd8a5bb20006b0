"""Continues recordings: prompts, a cache of keys and values, one token at a time, sampling, and what is kept of it."""
