"""Several processes that train one model: who they are, how they exchange data, and how gradients are added.

No other package of the project uses `torch.distributed`.
"""
