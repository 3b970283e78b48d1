"""The network: image encoder, text/fusion stream, heads."""
