"""Soft prompts on frozen encoder-decoders: prefixes at three attention sites, soft tokens in the encoder's rows."""
