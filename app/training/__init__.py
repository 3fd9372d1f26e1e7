"""Dataset in, adapter out."""
