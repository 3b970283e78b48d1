"""SIMLA vision-language pretraining. This file imports nothing: `import simla_ds` is instant.

Models: simla_ds.hub. Settings: simla_ds.config. The training step: simla_ds.task. Training: launch/pretrain.py.
"""

__version__ = "0.1.0"
