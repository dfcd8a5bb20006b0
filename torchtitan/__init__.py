"""Autoregressive models of spiking neural activity, trained at scale."""

__version__ = "0.1.0"
