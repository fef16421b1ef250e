"""Adapters: factored, never merged; equal to PEFT's merge; what is not plain LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mi_weightspace as mw
from mi_weightspace.core.errors import CheckpointError, MismatchError
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.lora import AdapterSource
from mi_weightspace.models.weights import CheckpointSource

peft = pytest.importorskip("peft")

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}


def adapter(folder: Path, family: str, *, std: float = 0.05, **config: Any) -> tuple[Path, Path]:
    """(adapter folder, folder of the model PEFT merged) on a base saved beside them."""
    base = toy.tiny_model(family, seed=0)
    toy.save_tiny(family, folder / "base", seed=0)
    base.name_or_path = str(folder / "base")
    given = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[family]} | config
    model = peft.get_peft_model(base, peft.LoraConfig(**given))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std, generator=draw) if std else parameter.zero_()
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.mark.parametrize("family", sorted(TARGETS))
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"c_proj": 3}}])
def test_factors_are_pefts_own_merge(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Conv1D (fan_in_fan_out) and fused matrices included; 1e-6 relative, float32."""
    own, merged = adapter(tmp_path, family, **config)
    difference = mw.load_lineage(base=tmp_path / "base", sft=own).diff("base", "sft")
    base, whole = CheckpointSource(tmp_path / "base"), CheckpointSource(merged)
    changed = 0
    for site in difference.sites("blocks.*"):
        factors = difference.factors(site)
        assert factors is not None
        expected = whole.weight(site).double() - base.weight(site).double()
        error = (factors[0].double() @ factors[1].double() - expected).norm()
        assert float(error) <= 1e-6 * float(whole.weight(site).norm()), site
        changed += bool(expected.abs().max() > 0)
    assert changed >= 4


def test_an_adapter_that_did_not_land_is_no_change(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path, "llama", std=0.0)
    lineage = mw.load_lineage(base=tmp_path / "base", sft=own)
    report = mw.svd(lineage.diff("base", "sft"), rank=2, progress=False)
    assert [v.word for v in report.verdicts] == [Word.NO_CHANGE]
    assert [v.word for v in lineage.check().verdicts] == [Word.NO_CHANGE]


def test_an_adapter_runs_as_a_stage(tmp_path: Path) -> None:
    own, merged = adapter(tmp_path, "llama")
    tokens = torch.arange(8)[None]
    lineage = mw.load_lineage(base=tmp_path / "base", sft=own)
    expected = mw.load(merged).run(tokens).logits
    with lineage.opened("sft") as lens:
        found = lens.run(tokens).logits
    assert found is not None and expected is not None
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "nowhere"),
    ],
)
def test_what_is_not_plain_low_rank_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    own, _ = adapter(tmp_path, "llama")
    file = own / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=says):
        AdapterSource.open(own)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path, "llama")
    wider = toy.save_tiny("llama", tmp_path / "wide", d_model=64)
    with pytest.raises(MismatchError, match="as in the base model"):
        AdapterSource.open(own, base=CheckpointSource(wider))
    other = toy.save_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="factors for"):
        AdapterSource.open(own, base=CheckpointSource(other))


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path, "llama")
    weights = own / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        AdapterSource.open(own)
