"""Causal attention with sinks and a window, over a paged cache."""
