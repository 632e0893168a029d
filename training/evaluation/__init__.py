"""Responses drawn, judged, kept on disk and counted: what `evaluate` does, and `train` before and after."""
