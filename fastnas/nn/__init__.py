"""Drop-in modules: candidate operations, the mixed operation of an edge, drop path."""

from fastnas.nn.candidates import (
    DilConv,
    FactorizedReduce,
    ReLUConvBN,
    SepConv,
    Zero,
    build_candidate,
    candidate_names,
    register_candidate,
)
from fastnas.nn.drop_path import DropPath
from fastnas.nn.mixed_op import MixedOp

__all__ = [
    "DilConv",
    "DropPath",
    "FactorizedReduce",
    "MixedOp",
    "ReLUConvBN",
    "SepConv",
    "Zero",
    "build_candidate",
    "candidate_names",
    "register_candidate",
]
