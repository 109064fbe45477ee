"""Lowering: exported programs become files that a target runs."""
