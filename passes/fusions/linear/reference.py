"""The op is torch's own `aten.linear`: y = x Wᵀ + b, with x [..., K], W [N, K] and b [N] or None, result [..., N]."""
