"""The one table of facts about operations: passes ask it, nothing else knows them."""

from __future__ import annotations

from gdnsq_fx.opinfo import OpTable
from gdnsq_fx.oprows.activations import ACTIVATIONS
from gdnsq_fx.oprows.layers import LAYERS
from gdnsq_fx.oprows.products import PRODUCTS
from gdnsq_fx.oprows.recurrent import RECURRENT
from gdnsq_fx.oprows.tensors import TENSORS

DEFAULT_TABLE = OpTable((*LAYERS, *PRODUCTS, *RECURRENT, *ACTIVATIONS, *TENSORS))
