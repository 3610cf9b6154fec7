"""Side-by-side timings of Trimtab and its peers: ``python -m benchmarks list``."""
