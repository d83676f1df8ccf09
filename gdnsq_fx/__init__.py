"""Capture, analyze, quantize, fine-tune and convert any PyTorch model.

    qmodel = gdnsq_fx.prepare(model, example_input)
    print(gdnsq_fx.analyze(qmodel, batches))
    gdnsq_fx.finetune(qmodel, train_batches, steps=2000)
    imodel = gdnsq_fx.convert(qmodel)
    gdnsq_fx.save(imodel, "model.safetensors")

The method is GDNSQ (arXiv 2508.14004).
"""

from gdnsq_fx.analysis.allocation import Allocation
from gdnsq_fx.analysis.coverage import Coverage, Skip, Totals
from gdnsq_fx.analysis.cuts import MinimumCut
from gdnsq_fx.analysis.diff import EdgeChange, ReportDiff
from gdnsq_fx.analysis.dynamics import CapacityTracker
from gdnsq_fx.analysis.edge_report import EdgeReport
from gdnsq_fx.analysis.profile import Position
from gdnsq_fx.analysis.report import CapacityReport
from gdnsq_fx.api import allocate, analyze, assign_bits, prepare
from gdnsq_fx.budget import Budget
from gdnsq_fx.channels import ChannelLayout
from gdnsq_fx.deploy.certificate import Certificate
from gdnsq_fx.deployment import compile, convert, export, save, verify
from gdnsq_fx.errors import (
    BatchStructureError,
    BudgetError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    CompilerError,
    ConfigError,
    DeviceMismatchError,
    ExportError,
    FileFormatError,
    GdnsqError,
    MissingExtraError,
    NothingToQuantizeError,
    NotQuantizedError,
    PassError,
    PatternError,
    TrainingDivergedError,
)
from gdnsq_fx.inputs import InputStructure
from gdnsq_fx.loading import load
from gdnsq_fx.operands import Call, Stored
from gdnsq_fx.operation import operation
from gdnsq_fx.opinfo import OpInfo, OpTable
from gdnsq_fx.optable import DEFAULT_TABLE
from gdnsq_fx.quantize.quantizer import quantization_disabled, use_kernels
from gdnsq_fx.quantize.recompute import recomputed_levels
from gdnsq_fx.spec import Override, QuantConfig, QuantSpec
from gdnsq_fx.training.callbacks import Callback, TensorBoardCallback
from gdnsq_fx.training.finetune import FinetuneResult, finetune
from gdnsq_fx.training.losses import (
    distillation_loss,
    kl_distillation_loss,
    squared_distillation_loss,
)
from gdnsq_fx.training.result import StepRecord
from gdnsq_fx.training.schedule import Schedule
from gdnsq_fx.training.teacher import Teacher, with_teacher_outputs

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_TABLE",
    "Allocation",
    "BatchStructureError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Call",
    "Callback",
    "CapacityReport",
    "CapacityTracker",
    "CaptureError",
    "Certificate",
    "ChannelLayout",
    "CheckpointError",
    "CompilerError",
    "ConfigError",
    "Coverage",
    "DeviceMismatchError",
    "EdgeChange",
    "EdgeReport",
    "ExportError",
    "FileFormatError",
    "FinetuneResult",
    "GdnsqError",
    "InputStructure",
    "MinimumCut",
    "MissingExtraError",
    "NotQuantizedError",
    "NothingToQuantizeError",
    "OpInfo",
    "OpTable",
    "Override",
    "PassError",
    "PatternError",
    "Position",
    "QuantConfig",
    "QuantSpec",
    "ReportDiff",
    "Schedule",
    "Skip",
    "StepRecord",
    "Stored",
    "Teacher",
    "TensorBoardCallback",
    "Totals",
    "TrainingDivergedError",
    "allocate",
    "analyze",
    "assign_bits",
    "compile",
    "convert",
    "distillation_loss",
    "export",
    "finetune",
    "kl_distillation_loss",
    "load",
    "operation",
    "prepare",
    "quantization_disabled",
    "recomputed_levels",
    "save",
    "squared_distillation_loss",
    "use_kernels",
    "verify",
    "with_teacher_outputs",
]
