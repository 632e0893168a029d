"""The backends, a room each, of one interface: `available(device)`, and the passes that the backend has.

`available` gives the reason why a backend cannot serve tensors of a device, `""` where it can. A pass is a function of
the name and the arguments that :mod:`rhythm_kernels.ops` gives it; one that a backend lacks is a function it does not
have. Nothing here checks an argument, and no backend is imported before it is asked for.
"""
