"""What a stored graph may call: names of functions, methods, attributes and modules.

A file names what it calls, and nothing is imported by such a name: it is looked up in
the tables here, which hold what computes with tensors and numbers. Not in them is what
reads or writes files, runs code, or shows memory that nobody has written to.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gdnsq_fx.deploy.integer import dequantize, quantize
from gdnsq_fx.deploy.qdq import operation

_TORCH = """
abs acos add addbmm addcdiv addcmul addmm addmv adjoint all allclose amax amin aminmax
any arange argmax argmin argsort asin atan atan2 baddbmm bitwise_and bitwise_not
bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat cdist ceil celu
chunk clamp clamp_max clamp_min clip clone complex concat concatenate cos cosh
count_nonzero
cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal diff div
divide dot dstack einsum eq erf erfc exp exp2 expm1 eye flatten flip float_power floor
floor_divide fmax fmin fmod frac full full_like gather ge greater greater_equal gt
heaviside hstack imag index_add index_fill index_select inner inverse is_floating_point
isclose isfinite isin isinf isnan kron le lerp less less_equal linspace log log10 log1p
log2 logaddexp logical_and logical_not logical_or logical_xor logspace logsumexp lt
masked_fill masked_select matmul max maximum mean median meshgrid min minimum mm
moveaxis movedim mul multiply mv nan_to_num nansum narrow ne neg negative nonzero norm
not_equal numel ones ones_like outer permute polar positive pow prod quantile rad2deg
ravel real reciprocal relu remainder repeat_interleave reshape result_type roll rot90
round rsqrt rsub scalar_tensor scatter scatter_add searchsorted select selu sgn sigmoid
sign sin sinc sinh softmax log_softmax sort split split_with_sizes sqrt square squeeze
stack std std_mean sub subtract sum swapaxes swapdims t take take_along_dim tan tanh
tensor tensor_split tensordot tile topk trace transpose tril tril_indices triu
triu_indices true_divide trunc unbind unflatten unsqueeze var var_mean vdot
view_as_complex view_as_real vstack where zeros zeros_like conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d layer_norm group_norm batch_norm
instance_norm rms_norm prelu rrelu hardshrink bilinear embedding embedding_bag dropout
pixel_shuffle pixel_unshuffle channel_shuffle cosine_similarity max_pool1d max_pool2d
max_pool3d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d lstm gru rnn_tanh
rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _assert
"""
_FUNCTIONAL = """
relu relu_ relu6 elu elu_ selu celu gelu silu mish hardswish hardsigmoid hardtanh
hardtanh_ leaky_relu leaky_relu_ logsigmoid softplus softsign softshrink tanhshrink
threshold glu sigmoid tanh softmax log_softmax softmin normalize linear bilinear
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d layer_norm
group_norm batch_norm instance_norm rms_norm local_response_norm embedding one_hot
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d lp_pool1d lp_pool2d pad interpolate upsample grid_sample affine_grid
pixel_shuffle pixel_unshuffle fold unfold dropout dropout1d dropout2d dropout3d
alpha_dropout feature_alpha_dropout scaled_dot_product_attention cosine_similarity
"""
_OPERATOR = """
abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv imul
index inv invert ior is_ is_not isub itruediv ixor le lshift lt matmul imatmul mod mul
ne neg not_ or_ pos pow rshift setitem sub truediv truth xor
"""
_MATH = "ceil floor sqrt log log2 log10 exp prod trunc isqrt pow fabs gcd"
_BUILTINS = "abs bool divmod float getattr int len max min round slice sum tuple list"
_QDQ = "quantize_per_tensor dequantize_per_tensor dequantize_per_channel"

_OF_TENSORS = """
abs_ add_ addcmul_ addmm_ baddbmm_ bfloat16 bitwise_and_ bool ceil_ clamp_
clamp_max_ clamp_min_ contiguous copy_ cos_ cpu cumsum_ detach_ dim div_ double
element_size exp_ expand expand_as fill_ fill_diagonal_ float floor_ floor_divide_
half index_add_ index_copy index_copy_ index_fill_ index_put index_put_ int
is_complex item lerp_ log_ long logical_and_ logical_not_ logical_or_ masked_fill_
masked_scatter masked_scatter_ mul_ ndimension neg_ nelement new_full new_ones
new_tensor new_zeros pow_ relu_ repeat reshape_as round_ rsqrt_ scatter_
scatter_add_ sigmoid_ sign_ sin_ size sqrt_ squeeze_ stride sub_ sum_to_size t_
tanh_ to tolist transpose_ tril_ triu_ type_as unfold unsqueeze_ view view_as zero_
multiply_ subtract_ divide_ storage_offset is_contiguous index count
__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__
__truediv__ __rtruediv__ __itruediv__ __floordiv__ __rfloordiv__ __mod__ __pow__
__rpow__ __neg__ __matmul__ __rmatmul__ __getitem__ __setitem__ __eq__ __ne__ __lt__
__le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__ __len__ __bool__ __int__
__float__ __rand__ __ror__ __rxor__ __iand__ __ior__ __abs__
"""
_NO_METHODS = {"tensor", "arange", "complex", "_assert", "lstm", "gru"}
METHODS = frozenset((_TORCH + _OF_TENSORS).split()) - _NO_METHODS
"""Methods of tensors, sizes and numbers."""

_ATTRIBUTES = "shape dtype device ndim T H mT mH data real imag values indices is_cuda"
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
"""What ``getattr`` may read."""

_BATCH_NORM = "num_features eps momentum affine track_running_stats"
_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias"
_POOL = "kernel_size stride padding dilation return_indices ceil_mode"
_AVERAGE = "kernel_size stride padding ceil_mode count_include_pad"
_MODULES = {
    **dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), _BATCH_NORM),
    **dict.fromkeys(
        ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"), _BATCH_NORM
    ),
    "LayerNorm": "normalized_shape eps elementwise_affine bias",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine",
    "LocalResponseNorm": "size alpha beta k",
    "Linear": "in_features out_features bias",
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), f"{_CONV} padding_mode"),
    "Embedding": "num_embeddings embedding_dim padding_idx",
    "PReLU": "num_parameters",
    **dict.fromkeys(("MaxPool1d", "MaxPool2d", "MaxPool3d"), _POOL),
    "AvgPool1d": _AVERAGE,
    **dict.fromkeys(("AvgPool2d", "AvgPool3d"), f"{_AVERAGE} divisor_override"),
    **dict.fromkeys(
        ("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"), "output_size"
    ),
    **dict.fromkeys(
        ("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"),
        "output_size return_indices",
    ),
    **dict.fromkeys(
        ("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"), "inplace"
    ),
    **dict.fromkeys(("ELU", "CELU"), "alpha inplace"),
    "GELU": "approximate",
    "Hardtanh": "min_val max_val inplace",
    "LeakyReLU": "negative_slope inplace",
    "Threshold": "threshold value inplace",
    "Softplus": "beta threshold",
    **dict.fromkeys(
        ("Sigmoid", "Tanh", "LogSigmoid", "Softsign", "Tanhshrink", "Identity"), ""
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Softmin", "GLU"), "dim"),
    "Softmax2d": "",
    **dict.fromkeys(
        ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"), "p inplace"
    ),
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "PixelShuffle": "upscale_factor",
    "PixelUnshuffle": "downscale_factor",
    "ChannelShuffle": "groups",
    **dict.fromkeys(
        tuple(
            f"{kind}Pad{n}d"
            for kind in ("Reflection", "Replication", "Zero")
            for n in (1, 2, 3)
        ),
        "padding",
    ),
    **dict.fromkeys(
        ("ConstantPad1d", "ConstantPad2d", "ConstantPad3d"), "padding value"
    ),
    "Fold": "output_size kernel_size dilation padding stride",
    "Unfold": "kernel_size dilation padding stride",
}


@functools.cache
def functions() -> Mapping[str, Callable[..., Any]]:
    """Name -> function, of those that this torch has."""
    rooms: list[tuple[str, Any, str]] = [
        ("torch", torch, _TORCH),
        ("torch.nn.functional", F, _FUNCTIONAL),
        ("operator", operator, _OPERATOR),
        ("math", math, _MATH),
        ("builtins", builtins, _BUILTINS),
    ]
    found: dict[str, Callable[..., Any]] = {
        f"{room}.{name}": getattr(holder, name)
        for room, holder, names in rooms
        for name in names.split()
        if hasattr(holder, name)
    }
    for name in _QDQ.split():
        found[f"quantized_decomposed.{name}"] = operation(name)
    return {**found, "gdnsq_fx.quantize": quantize, "gdnsq_fx.dequantize": dequantize}


@functools.cache
def function_names() -> Mapping[Callable[..., Any], str]:
    """Function -> its first name."""
    return {f: name for name, f in reversed(list(functions().items()))}


@functools.cache
def module_classes() -> Mapping[str, tuple[type[nn.Module], tuple[str, ...]]]:
    """Name -> class of torch.nn, and the attributes that its constructor takes."""
    return {
        name: (getattr(nn, name), tuple(attributes.split()))
        for name, attributes in _MODULES.items()
        if hasattr(nn, name)
    }
