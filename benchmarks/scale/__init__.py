"""Scale: the same run in one process and in two, side by side: throughput, memory, and what messages cost."""
