"""Training under DeepSpeed: the only package that imports deepspeed."""
