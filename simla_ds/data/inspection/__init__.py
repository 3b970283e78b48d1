"""`simla inspect`: what shards hold, and what of it training would pass over, before the training finds out."""
