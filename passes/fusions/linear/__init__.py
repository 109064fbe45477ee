"""Dense layers: `aten.linear` as it is, with a kernel of our own where torch's is slow."""
