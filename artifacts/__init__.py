"""Checkpoints that come with oxfuse, and the scripts that made them."""
