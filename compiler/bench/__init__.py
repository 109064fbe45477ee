"""Benchmarks: speed, memory and compile time, each run by hand and never by a unit test. Their last figures lie in `results/`."""
