"""Parity: the same training steps computed by Trimtab and by a library that nobody here wrote.

``python -m benchmarks parity`` runs every case of ``cases.py``: our side first (``ours.py``, the method's own
``train``), which writes down the batches that it trained on; then the peer (``benchmarks/peers/parity_*.py``,
in an environment of its own) on those very batches, from the same weights, in fp32. ``compare.py`` holds the
two curves of loss and gradient norm against each other.
"""
