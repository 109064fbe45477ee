"""Attention of whole tensors, as models in memory compute it: keys as their cache holds them, and a mask that is given."""
