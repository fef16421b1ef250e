"""The notebook lines on a user's own checkpoint, through every backend; the object stays intact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import conformance  # pyright: ignore[reportMissingImports]

import mi_weightspace as mw
from mi_weightspace.models import toy
from mi_weightspace.models.load import load
from mi_weightspace.vpd.run import decompose

FAMILIES = ("gpt2", "llama", "gpt_neox")
OWN = ("bridge", "nnsight", "hooked_transformer")
LATE = ("blocks.1.attn.v", "blocks.1.mlp.in")
EDGES = ("embed", "blocks.0.attn.q", "unembed")
LOSSES = ("faithfulness", "minimality", "reconstruction.0.uniform", "reconstruction.1.persistent")
QUICK = {"budgets": (2,), "free_budgets": (2,), "n_pgd_batches": 1}
HELD_OUT = torch.randint(4, 300, (2, 8), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(4, 300, (8, 8), generator=torch.Generator().manual_seed(0))


def config(sites: tuple[str, ...]) -> Any:
    return mw.vpd.Config(
        sites=sites,
        n_components=32,
        n_steps=3,
        batch_size=2,
        warmup_steps=2,
        log_every=1,
        seed=0,
        importance={"hidden": (8,)},  # pyright: ignore[reportArgumentType]
    )


def decomposed(model: Any, sites: tuple[str, ...], **more: Any) -> Any:
    return mw.vpd.decompose(
        model,
        TOKENS,
        config(sites),
        held_out=HELD_OUT,
        progress=False,
        evaluation=QUICK,
        **more,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("checkpoints")
    return {family: toy.save_tiny(family, place / family, seed=0) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, tuple[str, ...]], Any]:
    """By torch hooks, from the folder."""
    return {
        (family, sites): decomposed(folders[family], sites)
        for family in FAMILIES
        for sites in (LATE, EDGES)
    }


def own_object(kind: str, family: str, folder: Path) -> Any:
    """The object a user of that library has in the notebook, with a hook of the user's on it."""
    model = toy.tiny_model(family, seed=0)
    if kind == "hooked_transformer":
        if not conformance.has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        return conformance.hooked_transformer(model)
    make = {"bridge": conformance.bridge, "nnsight": conformance.language_model}[kind]
    return make(model, folder)


def check_losses(found: Any, wanted: Any) -> None:
    one, other = found.tables["history"], wanted.tables["history"]
    assert len(one) == 3
    for name in LOSSES:
        difference = (one[name] - other[name]).abs() / other[name].abs()
        assert difference.max() <= 1e-5, (name, list(one[name]), list(other[name]))


@pytest.mark.parametrize("sites", [LATE, EDGES], ids=["late", "edges"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OWN)
def test_the_users_object_gives_the_same_losses_and_stays_as_it_was(
    kind: str, family: str, sites: tuple[str, ...], expected: Any, tmp_path: Path
) -> None:
    mine = own_object(kind, family, tmp_path)
    lens = load(mine)
    root: Any = lens.root
    calls: list[int] = []
    handle = next(m for m in root.modules() if not list(m.children())).register_forward_hook(
        lambda *_: calls.append(1)
    )
    root.train()
    frozen = next(root.parameters()).requires_grad_(False)
    with conformance.untouched(root):
        parts = decomposed(mine, sites)
    assert calls and root.training and not frozen.requires_grad
    handle.remove()
    check_losses(parts, expected[family, sites])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_a_folder_through_a_named_backend(
    backend: Any, family: str, folders: dict[str, Path], expected: Any
) -> None:
    lens = mw.load_lineage(a=folders[family], b=folders[family], backend=backend)["b"]
    with conformance.untouched(lens.root):
        parts = decomposed(lens, LATE)
    check_losses(parts, expected[family, LATE])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_in_front_are_skipped_and_nothing_else_changes(
    family: str, folders: dict[str, Path], expected: Any
) -> None:
    lens: Any = load(folders[family])
    first = lens.root.get_submodule(f"{lens.shape.table.blocks}.0")
    calls: list[int] = []
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    settings = config(LATE)
    whole = settings.speed.model_copy(update={"prefix": False})
    plain = settings.model_copy(update={"speed": whole})
    options: dict[str, Any] = {"held_out": HELD_OUT, "progress": False, "evaluation": QUICK}
    decompose(lens, TOKENS, settings, **options)
    skipping = len(calls)
    without = decompose(lens, TOKENS, plain, **options)
    handle.remove()
    assert 0 < skipping < (len(calls) - skipping) / 3
    check_losses(without, expected[family, LATE])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OWN)
def test_an_edit_made_of_parts_is_the_model_without_them(
    kind: str, family: str, expected: Any, tmp_path: Path
) -> None:
    """Against a plain Hugging Face model whose matrix was changed by hand."""
    parts = expected[family, LATE]
    site, gone = LATE[1], [3, 17]
    lens = load(own_object(kind, family, tmp_path))
    model = toy.tiny_model(family, seed=0)
    weight = conformance.Oracle(model).weight(site)
    removed = parts.write(site)[gone].T @ parts.read(site)[gone]
    assert removed.norm() > 0.01 * weight.norm()
    by_hand = conformance.Oracle(model).with_weight(site, weight - removed)
    with conformance.untouched(lens.root):
        edited = lens.with_edit(parts.ablate(site, gone))
        logits = edited.run(TOKENS).logits
    with torch.no_grad():
        assert conformance.close(logits, by_hand(TOKENS).logits)
        assert not conformance.close(logits, model(TOKENS).logits)
