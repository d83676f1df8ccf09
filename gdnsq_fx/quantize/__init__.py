"""GDNSQ quantizers: estimators, the fused functions, and the modules."""
