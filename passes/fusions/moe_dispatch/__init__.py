"""Mixture of experts: router, experts and combination in one op."""
