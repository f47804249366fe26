"""Soft prompts on frozen encoder-decoders: prefixes in three kinds of attention, soft tokens in the encoder's rows."""
