"""Dense layers: `aten.linear` as it is, with kernels of our own where torch's are slow."""
