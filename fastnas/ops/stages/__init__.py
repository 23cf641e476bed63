"""The stages of a fused supernet cell: the engine's own ops, below the drop-in ones.

Maps are ``[B, H, W, C]`` with the channels next to each other in memory: a channels-last image seen through
``permute(0, 2, 3, 1)``, or a slice of its channels. float32 or float64; bfloat16 with float32 for everything that is
no map (weights, coefficients, statistics), except in the compiled kernels. Nothing here is differentiable by itself:
``source_stage`` puts all stages of one state together, forward and backward, and ``fastnas.engine.fused_cell`` the
states of a cell.
"""
