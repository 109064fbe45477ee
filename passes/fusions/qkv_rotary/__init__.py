"""Projections of queries, keys and values, their rotation, and the write into the paged cache, in one launch (decode on GPUs)."""
