"""Checkpoints on disk: shards stream exactly, and every damage has one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mi_weightspace as mw
from mi_weightspace.core.errors import ArchitectureError, CheckpointError, MismatchError
from mi_weightspace.models import toy
from mi_weightspace.models.sources import open_path
from mi_weightspace.models.weights import CheckpointSource

pytestmark = pytest.mark.quick


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return toy.save_tiny("llama", tmp_path / "model", max_shard_size="20KB")


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_streamed_tensors_are_the_saved_ones(size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = toy.save_tiny("gpt2", tmp_path / "m", dtype=dtype, max_shard_size=size)
    source = CheckpointSource(folder)
    model = toy.tiny_model("gpt2").to(dtype)
    stored = source.stored("blocks.1.mlp.out")
    assert stored.dtype == dtype
    assert torch.equal(stored, model.transformer.h[1].mlp.c_proj.weight.T)
    queries = source.weight("blocks.0.attn.q")
    assert torch.equal(queries, model.transformer.h[0].attn.c_attn.weight.T[:32].float())


def truncate(folder: Path) -> None:
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-40])


def remove(folder: Path) -> None:
    shards(folder)[1].unlink()


def lose_a_tensor(folder: Path) -> None:
    shard = shards(folder)[1]
    held = load_file(shard)
    held.popitem()
    save_file(held, shard, metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    for shard in shards(folder):
        held = load_file(shard)
        for key in held:
            if key.endswith("layers.0.mlp.down_proj.weight"):
                held[key] = held[key][:, :-1].contiguous()
        save_file(held, shard, metadata={"format": "pt"})


def quantised(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(record))


def eight_bits(folder: Path) -> None:
    for shard in shards(folder):
        held = {
            k: v.to(torch.int8) if k.endswith("q_proj.weight") else v
            for k, v in load_file(shard).items()
        }
        save_file(held, shard, metadata={"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def half_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "damaged or truncated"),
        (remove, "which is not there"),
        (lose_a_tensor, "no tensor"),
        (wrong_shape, r"layers\.0\.mlp\.down_proj|blocks\.0\.mlp\.out"),
        (quantised, "quantised"),
        (eight_bits, "I8"),
        (no_config, r"no config\.json"),
        (half_config, "not JSON"),
        (empty_index, "no weight_map"),
    ],
)
def test_damage_is_named_at_opening(
    damage: Callable[[Path], None], says: str, sharded: Path
) -> None:
    CheckpointSource(sharded)  # sound before
    damage(sharded)
    with pytest.raises(CheckpointError, match=says) as caught:
        CheckpointSource(sharded)
    assert caught.value.remedy


def test_legacy_pickles_are_refused_with_the_conversion(tmp_path: Path, sharded: Path) -> None:
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "config.json").write_text((sharded / "config.json").read_text())
    torch.save({}, legacy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        CheckpointSource(legacy)
    assert "save_pretrained" in caught.value.remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(bad: float, tmp_path: Path) -> None:
    model = toy.tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[2, 3] = bad
    model.save_pretrained(tmp_path / "m")
    source = CheckpointSource(tmp_path / "m")
    source.weight("blocks.1.attn.q")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight.*1 NaN or infinite"
    ):
        source.weight("blocks.1.attn.v")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for given, says in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "file", "a file"),
        (tmp_path, "no config"),
    ):
        with pytest.raises(CheckpointError, match=says):
            open_path(given)


def test_a_family_without_a_table_is_refused_by_name(tmp_path: Path) -> None:
    folder = toy.save_tiny("llama", tmp_path / "m")
    record = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ArchitectureError, match="'mamba'") as caught:
        CheckpointSource(folder)
    assert "llama" in caught.value.expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"n_layers": 3}, "n_layers 2 and 3"),
        ({"d_model": 64}, "d_model 32 and 64"),
    ],
)
def test_stages_that_differ_are_refused(config: dict[str, int], says: str, tmp_path: Path) -> None:
    one = toy.save_tiny("llama", tmp_path / "a")
    other = toy.save_tiny("llama", tmp_path / "b", **config)
    with pytest.raises(MismatchError, match=says):
        mw.load_lineage(base=one, sft=other)
    neighbour = toy.save_tiny("mistral", tmp_path / "c")
    with pytest.raises(MismatchError, match="family llama and mistral"):
        mw.load_lineage(base=one, sft=neighbour)


def test_other_precision_and_other_tokenizer_are_reservations(tmp_path: Path) -> None:
    one = toy.save_tiny("llama", tmp_path / "a")
    other = toy.save_tiny("llama", tmp_path / "b", dtype=torch.bfloat16)
    record = json.loads((other / "tokenizer.json").read_text())
    vocab = record["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(record))
    said = mw.load_lineage(base=one, sft=other).reservations
    assert any("storage precision: base float32, sft bfloat16" in text for text in said)
    assert any("tokenizer" in text for text in said)
