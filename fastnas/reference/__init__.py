"""Every op in plain PyTorch, one file an op: the oracle of the tests, the fallback, and the benchmarks' baseline."""
