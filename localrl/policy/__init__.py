"""The policy: one frozen, quantised base with adapters on it.

This is the only room that imports bitsandbytes, peft and transformers' model classes.
"""
