"""SIMLA vision-language pretraining. This file imports nothing: `import simla_ds` is instant."""

__version__ = "0.1.0"
