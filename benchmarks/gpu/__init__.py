"""What needs a GPU, in two calls: `python -m benchmarks.gpu right`, then `fast`. See docs/gpu.md."""
