"""Home of the Triton kernels, importable as ``fastnas.kernels``; importing it loads nothing.

Never import this folder as ``kernels``: its modules would then exist twice and register their kernels twice.
"""
