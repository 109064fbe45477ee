"""RMSNorm, alone or after a residual sum."""
