"""The tool that tunes the Triton tiles for the GPU at hand: `python -m rhythm_kernels.tuning`. No pass needs it."""
