"""Training and evaluation of soft prompts."""
