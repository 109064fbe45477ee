"""Passes: a pre-dispatch ATen graph and a table of weights go in, both come out fused. No pass knows a model or reads a value."""
