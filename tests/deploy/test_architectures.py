"""Transformers from a config, and modules that stay opaque, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdnsq_fx
from gdnsq_fx.errors import ExportError

_IDS = torch.randint(0, 99, (3, 10), generator=torch.Generator().manual_seed(1))
_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


def _bert(attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**_SIZES, attn_implementation=attention)
    mask = torch.ones_like(_IDS)
    mask[1, 6:] = 0
    return BertForSequenceClassification(config), {
        "input_ids": _IDS,
        "attention_mask": mask,
    }


def _decoder(attention: str) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    given: dict[str, Any] = {"num_key_value_heads": 2, "use_cache": False}
    config = Qwen2Config(**_SIZES, **given, attn_implementation=attention)
    return Qwen2ForCausalLM(config), {"input_ids": _IDS}


@pytest.mark.parametrize(
    ("build", "attention"), [(_bert, "eager"), (_bert, "sdpa"), (_decoder, "sdpa")]
)
def test_transformers(build: Any, attention: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, inputs = build(attention)
    config = gdnsq_fx.QuantConfig(weight_bits=4, act_bits=8)
    qmodel = gdnsq_fx.prepare(net.eval(), inputs, config, [inputs])
    model = gdnsq_fx.convert(qmodel, deployable=True)
    path = tmp_path / "model.onnx"
    gdnsq_fx.export(model, path, inputs)
    options = runtime.SessionOptions()
    # 0, the default, lets onnxruntime round activations of its own.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(path, options)
    for count in (3, 1):
        cut = {name: value[:count] for name, value in inputs.items()}
        given = {name: value.numpy() for name, value in cut.items()}
        got = torch.tensor(session.run(None, given)[0])
        wanted = model(**cut)["logits"].detach()
        spread = float(wanted.max() - wanted.min())
        assert float((got - wanted).abs().max()) <= 0.01 * spread


def test_python_that_reads_data_cannot_be_exported(looped, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 8), looped(), nn.Linear(8, 2))
    qmodel = gdnsq_fx.prepare(net.eval(), x, calibration=[x])
    assert set(qmodel.facts.opaque) == {"1"}
    imodel = gdnsq_fx.convert(qmodel)
    with pytest.raises(ExportError, match=r"torch\.export refuses the model"):
        gdnsq_fx.export(imodel, tmp_path / "model.pt2", x)
    assert not list(tmp_path.iterdir())


def test_a_cache_cannot_be_exported_and_the_error_says_what_to_do(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    net, inputs = _decoder("sdpa")
    config: Any = net.config
    config.use_cache = True
    qmodel = gdnsq_fx.prepare(net.eval(), inputs, calibration=[inputs])
    imodel = gdnsq_fx.convert(qmodel)
    with pytest.raises(ExportError, match=r"DynamicCache.*config\.use_cache = False"):
        gdnsq_fx.export(imodel, tmp_path / "model.pt2", inputs)
