"""Benchmarks as commands: ratios inside one process, interleaved, see `cmp.bench.timing`."""
