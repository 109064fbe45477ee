"""Dense layers with weights of 8 bits, for CPUs: what a compile with `dense="int8"` makes of `aten.linear`."""
