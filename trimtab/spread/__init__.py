"""Work and weights over the processes of a run.

``deal.py`` deals passes out and puts what they found together; ``share.py`` does it with what is sampled and
scored. ``shard.py`` keeps a part of every weight in each process (FSDP2), and ``passes.py`` is how a model of
parts is passed through where processes do not have the same work. ``gloo.py`` is how parts are gathered and
their gradients summed on CPUs.
"""
