"""Trimtab: tune language models on preferences and rewards, on one core.

Everything that the command line does is a call: ``trimtab.methods.dpo.train(Config(...))``.
"""

__version__ = "0.1.0"
