"""`simla plan`: what a training run would need of memory, time and network, computed and never measured."""
