"""Graph -> graph, or graph -> facts: one pass a file, each file named after its pass.

Import it as ``gdnsq_fx.passes``. In a checkout the folder lies beside ``gdnsq_fx/``;
packaging maps it into place (``[tool.setuptools.package-dir]`` in pyproject.toml).
"""

if __name__ != "gdnsq_fx.passes":
    # Under a second name every pass class would exist twice, and isinstance would fail.
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'gdnsq_fx.passes' "
        "(in a checkout, first run: pip install -e .)"
    )

from ._base import Pass, placeholder_values
from ._masks import release_masks
from ._pipeline import run_passes
from .align_biases import AlignBiases
from .analyze_capacity import AnalyzeCapacity
from .annotate_operations import AnnotateOperations
from .assign_bits import AssignBits
from .calibrate import Calibrate
from .expose_weights import ExposeWeights
from .fold_batch_norm import FoldBatchNorm
from .fold_into_scales import FoldIntoScales
from .freeze_quantizers import FreezeQuantizers
from .insert_quantizers import InsertQuantizers
from .lower_to_integer import LowerToInteger
from .lower_to_qdq import LowerToQdq
from .lower_to_qonnx import LowerToQonnx
from .propagate_shapes import PropagateShapes
from .quantize_between_layers import QuantizeBetweenLayers

__all__ = [
    "AlignBiases",
    "AnalyzeCapacity",
    "AnnotateOperations",
    "AssignBits",
    "Calibrate",
    "ExposeWeights",
    "FoldBatchNorm",
    "FoldIntoScales",
    "FreezeQuantizers",
    "InsertQuantizers",
    "LowerToInteger",
    "LowerToQdq",
    "LowerToQonnx",
    "Pass",
    "PropagateShapes",
    "QuantizeBetweenLayers",
    "placeholder_values",
    "release_masks",
    "run_passes",
]
