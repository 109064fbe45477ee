"""A residual sum, its RMSNorm and the router's logits of a mixture of experts, in one launch (decode on GPUs)."""
