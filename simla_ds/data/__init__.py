"""From shards to batches: reading, transforms, masking, tokenisers, the loader, and the embedded scenes."""
