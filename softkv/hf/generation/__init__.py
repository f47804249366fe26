"""What `generate` needs beyond a forward pass."""
