"""One fused op, one folder: what it means, how it is found in a graph, and its kernels. Adding one touches nothing else."""
