"""The processes of one run: how they join, what they tell each other, what must be the same, who is lost.

Control is replicated and computation is dealt out (``trimtab/spread``). Every process has the whole batch,
the whole state and the same options, and takes the same decisions; passes of a model over some groups are
dealt out, and what they give is put together again in every process. So counts are global by construction,
data has one order, a checkpoint is that of any number of processes, and code that deals nothing out is
slower, never wrong.
"""
