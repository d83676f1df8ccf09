"""For type checkers in a checkout: `passes/` is imported as `gdnsq_fx.passes`.

Only packaging knows that mapping (pyproject.toml), so this stub repeats it. It is left
out of the wheel, where the package itself lies in this place.
"""

from passes import AlignBiases as AlignBiases
from passes import AnalyzeCapacity as AnalyzeCapacity
from passes import AnnotateOperations as AnnotateOperations
from passes import AssignBits as AssignBits
from passes import Calibrate as Calibrate
from passes import ExposeWeights as ExposeWeights
from passes import FoldBatchNorm as FoldBatchNorm
from passes import FoldIntoScales as FoldIntoScales
from passes import FreezeQuantizers as FreezeQuantizers
from passes import InsertQuantizers as InsertQuantizers
from passes import LowerToInteger as LowerToInteger
from passes import LowerToQdq as LowerToQdq
from passes import LowerToQonnx as LowerToQonnx
from passes import Pass as Pass
from passes import PropagateShapes as PropagateShapes
from passes import QuantizeBetweenLayers as QuantizeBetweenLayers
from passes import placeholder_values as placeholder_values
from passes import release_masks as release_masks
from passes import run_passes as run_passes
