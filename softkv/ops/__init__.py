"""The attention op: the public functions, their operator, and the engines behind it."""
