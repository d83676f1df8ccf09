"""A model in deployable form on the int8 kernels of torch's own compiler, inductor.

Its patterns of int8 layers are registered by an import of torchao (for all of torch, so
it is imported when asked for and not before). They match weights that are constants:
``freezing``, without gradients. A compiled graph may write into its inputs where a
residual starts at one, so it is given copies.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast, final

import torch
from torch import nn
from torch.fx import GraphModule

from gdnsq_fx.deploy.qdq import deploy_facts
from gdnsq_fx.errors import CompilerError
from gdnsq_fx.extras import required
from gdnsq_fx.state import cloned

EXTRA = "gdnsq-fx[inductor]"
_PATTERNS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
# What inductor counts when a layer becomes an int8 kernel.
_MATCHED = (
    "qconv_weight_prepack_matcher_count",
    "qlinear_weight_prepack_matcher_count",
)


@final
class CompiledModel(nn.Module):
    """Called as the model is; never writes into what it is given.

    Each new size of an input is compiled when it first comes.

    Attributes:
        kernels: how often layers became int8 kernels, by name of inductor's counter;
            empty where none did.
    """

    def __init__(self, model: GraphModule) -> None:
        super().__init__()
        self.kernels: dict[str, int] = {}
        # Sizes as they are: patterns of int8 layers do not match symbolic ones.
        self._compiled: Any = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes; no gradients.

        Raises:
            CompilerError: inductor fails, or there is no C++ compiler.
        """
        from torch._dynamo.exc import BackendCompilerFailed
        from torch._inductor import config as inductor_config

        given, named = cloned((args, kwargs))
        before = _matched()
        try:
            # Around the call, for that is when it compiles; as an option of
            # torch.compile it ends before the packed weights are computed.
            with inductor_config.patch(freezing=True):
                output = self._compiled(*given, **named)
        except BackendCompilerFailed as error:
            cause = str(error).strip().partition("\n")[0]
            raise CompilerError(
                f"inductor cannot compile the model: {cause}"
            ) from error
        for name, count in (_matched() - before).items():
            self.kernels[name] = self.kernels.get(name, 0) + count
        return output


def require_inductor() -> None:
    """Check that inductor can compile int8 kernels here, and register its patterns.

    Raises:
        MissingExtraError: torchao is not installed.
        CompilerError: there is no C++ compiler.
    """
    required(_PATTERNS, "compiling to int8 kernels", EXTRA)
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise CompilerError(
            f"inductor has no C++ compiler ({str(error).partition(chr(10))[0]}); "
            "install g++ or clang++, or set CXX to one"
        ) from error


def compile_int8(
    model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CompiledModel:
    """Compile a model for inputs of the given sizes.

    Args:
        model: in deployable form and in evaluation.
        args, kwargs: an example of its inputs; left as they are.

    Raises:
        PassError: not in deployable form.
        MissingExtraError: torchao is not installed.
        CompilerError: inductor fails, or there is no C++ compiler.
    """
    deploy_facts(model)
    require_inductor()
    compiled = CompiledModel(model)
    compiled(*args, **kwargs)
    return compiled


def _matched() -> Counter[str]:
    from torch._dynamo.utils import counters

    found = cast("dict[str, int]", counters["inductor"])
    return Counter({name: found.get(name, 0) for name in _MATCHED})
