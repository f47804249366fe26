"""The four soft-prompt methods."""
