"""Downstream tasks: model head, loss and evaluation protocol, one module each."""
