"""Pure mathematics on tensors: losses, advantages, divergences, and the one place that reduces.

Legend (see also ``trimtab/batch.py``): ``_N`` responses, ``_T`` tokens of a response, ``_P`` prompts,
``_G`` responses in a group. Every loss is unreduced and in nats; masks are boolean, True = counts.
Log-probabilities are named by their source: ``policy_``, ``old_``, ``ref_``, ``sampler_``.
"""
