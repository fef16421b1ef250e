"""SAELens is the oracle: what it encodes and decodes, our tensors must, for every architecture."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mi_weightspace.core.errors import CheckpointError, MismatchError, WeightspaceError
from mi_weightspace.core.sae import Sae, SaeMetadata
from mi_weightspace.core.space import Space
from probes import sae_io
from probes.sae_disk import CFG, WEIGHTS
from probes.sae_io import load_sae, save_sae, to_saelens

sae_lens = pytest.importorskip("sae_lens")

D, H, K = 16, 48, 4
TRAINED = {
    "standard": {},
    "gated": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": float(K)},
    "jumprelu": {},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": [12, 24, H]},
    "matching_pursuit": {"decoder_init_norm": 1.0},
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def randomise(sae: Any, seed: int = 0) -> Any:
    """Every tensor drawn: zero biases and unit decoders would hide a missing term."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sae.named_parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=draw))
            if name == "threshold":
                value.abs_()
        if sae.cfg.architecture() == "matching_pursuit":  # much longer rows diverge
            sae.W_dec.mul_(
                (0.8 + 0.4 * torch.rand(H, 1, generator=draw)) / sae.W_dec.norm(dim=1, keepdim=True)
            )
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
    return sae


def training_sae(architecture: str, **changes: Any) -> Any:
    from sae_lens.registry import get_sae_training_class

    made, config = get_sae_training_class(architecture)
    own = config(d_in=D, d_sae=H, **(TRAINED[architecture] | changes))
    own.metadata.hook_name = "blocks.1.hook_resid_post"
    own.metadata.model_name = "owner/tiny"
    return randomise(made(own))


def inference_sae(architecture: str) -> Any:
    from sae_lens.registry import get_sae_class

    made, config = get_sae_class(architecture)
    sizes: dict[str, Any] = {"d_in": D, "d_sae": H}
    if "transcoder" in architecture:
        sizes |= {"d_out": D + 3, "apply_b_dec_to_input": False}
    return randomise(made(config(**sizes)))


def points(seed: int = 1, n: int = 64) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def assert_same(ours: Sae, theirs: Any) -> None:
    x = points()
    with torch.no_grad():
        codes, rebuilt = theirs.encode(x), theirs.decode(theirs.encode(x))
    assert 0 < float((codes != 0).float().mean()) < 1
    assert (ours.encode(x) - codes).abs().max() <= 1e-6 * codes.abs().max()
    assert (ours.encode_sparse(x).dense() - codes).abs().max() <= 1e-6 * codes.abs().max()
    assert (ours.decode(codes) - rebuilt).abs().max() <= 1e-6 * rebuilt.abs().max()


@pytest.mark.parametrize("architecture", TRAINED)
@pytest.mark.parametrize("applied", [True, False])
def test_every_trainable_architecture(architecture: str, applied: bool, tmp_path: Path) -> None:
    trained = training_sae(architecture, apply_b_dec_to_input=applied)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    from_disk, live, as_loaded = (load_sae(s) for s in (tmp_path / "inference", trained, theirs))
    for ours in (from_disk, live, as_loaded):
        assert_same(ours, theirs)
        assert ours.space == Space("resid_post", 1)
        assert ours.metadata.model_name == "owner/tiny"
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]), name  # the user's object is as it was
    trained.save_model(tmp_path / "checkpoint")  # what SAELens writes while training
    assert_same(load_sae(tmp_path / "checkpoint"), theirs)
    batch = "batchtopk" in architecture
    assert from_disk.architecture == ("jumprelu" if batch else architecture)
    assert from_disk.metadata.trained_k == (K if batch else None)
    randomise(trained, seed=9)
    assert_same(live, theirs)  # a copy


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "batchtopk"])
def test_decoder_norm_rescaling(architecture: str, rescaled: bool, tmp_path: Path) -> None:
    trained = training_sae(architecture, rescale_acts_by_decoder_norm=rescaled)
    trained.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(load_sae(tmp_path), theirs)
    if architecture != "batchtopk":  # its training encoder looks at the whole batch
        assert_same(load_sae(trained), trained)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders(architecture: str, tmp_path: Path) -> None:
    theirs = inference_sae(architecture)
    theirs.save_model(tmp_path)
    for ours in (load_sae(tmp_path), load_sae(theirs)):
        assert_same(ours, theirs)
        assert ours.d_out == D + 3 and not ours.reconstructs


STOPS = [
    {"max_iterations": 3},
    {"residual_threshold": 1.5, "stop_on_duplicate_support": False},
    {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 30},
    {"residual_threshold": 1.5},
    {"residual_threshold": 0.0},
]


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("stops", STOPS)
def test_the_stops_of_a_matching_pursuit(
    stops: dict[str, Any], applied: bool, tmp_path: Path
) -> None:
    trained = training_sae("matching_pursuit", apply_b_dec_to_input=applied, **stops)
    trained.save_inference_model(tmp_path / "theirs")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    live = load_sae(trained)
    others = [training_sae("matching_pursuit", apply_b_dec_to_input=applied, **s) for s in STOPS]
    x = points()
    with torch.no_grad():  # each of the stops matters here
        assert sum(torch.allclose(other.encode(x), theirs.encode(x)) for other in others) == 1
    save_sae(live, tmp_path / "ours")
    assert set(load_file(tmp_path / "ours" / WEIGHTS)) == {"W_dec", "b_dec"}
    for ours in (live, load_sae(tmp_path / "theirs"), load_sae(tmp_path / "ours")):
        assert_same(ours, theirs)
        assert_same(ours, to_saelens(ours))
        cubes = x.view(4, 16, D)
        assert torch.equal(ours.encode(cubes), ours.encode(x).view(4, 16, H))
        with torch.no_grad():
            gap = ours.decode(ours.encode(x)) - theirs.decode(theirs.encode(x))
        assert gap.abs().max() <= 1e-6 * x.abs().max()
    assert_same(load_sae(tmp_path / "ours"), sae_lens.SAE.load_from_disk(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("residual_threshold", "small"),
        ("residual_threshold", float("nan")),
        ("max_iterations", 0),
        ("max_iterations", 2.5),
        ("stop_on_duplicate_support", "yes"),
    ],
)
def test_stops_that_are_none(key: str, value: Any, tmp_path: Path) -> None:
    training_sae("matching_pursuit").save_inference_model(tmp_path)
    edited(tmp_path, key, value)
    with pytest.raises((CheckpointError, MismatchError), match=key) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in caught.value.subject


SAVED = ["standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit"]


@pytest.mark.parametrize("architecture", SAVED)
def test_what_we_save_saelens_loads(architecture: str, tmp_path: Path) -> None:
    ours = load_sae(training_sae(architecture)).described(
        convention="centred", prepend_bos=True, context_size=32
    )
    save_sae(ours, tmp_path)
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))
    assert_same(ours, to_saelens(ours))
    again = load_sae(tmp_path)
    assert again.metadata == ours.described(source=str(tmp_path)).metadata
    assert_same(load_sae(to_saelens(ours)), to_saelens(ours))


def test_transcoder_round_trip(tmp_path: Path) -> None:
    ours = load_sae(inference_sae("jumprelu_skip_transcoder"))
    save_sae(ours, tmp_path)
    assert ours.W_skip is not None
    assert torch.equal(load_sae(tmp_path).W_skip, ours.W_skip)
    assert_same(ours, to_saelens(ours))


def test_temporal_is_refused(tmp_path: Path) -> None:
    training_sae("topk").save_inference_model(tmp_path)
    edited(tmp_path, "architecture", "temporal")
    with pytest.raises(CheckpointError, match=r"cfg\.json, architecture.*earlier tokens"):
        load_sae(tmp_path)


def test_every_architecture_saelens_trains_is_held_to_it() -> None:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    own = {name for name in SAE_TRAINING_CLASS_REGISTRY if "transcoder" not in name}
    assert own - {"temporal"} == {*TRAINED} == {*sae_io.TRAINABLE}


@pytest.mark.parametrize(
    ("kwargs", "convention"),
    [(None, "unknown"), ({}, "raw"), ({"center_writing_weights": True}, "centred")],
)
def test_convention(kwargs: dict[str, bool] | None, convention: str) -> None:
    theirs = training_sae("topk")
    if kwargs is not None:
        theirs.cfg.metadata.model_from_pretrained_kwargs = kwargs
    assert load_sae(theirs).metadata.convention == convention


def old_format(folder: Path) -> None:
    """The layout before SAELens 6: everything at the top level, top-k as an activation function."""
    theirs = training_sae("topk", rescale_acts_by_decoder_norm=False)
    theirs.save_inference_model(folder)
    config = {
        "d_in": D,
        "d_sae": H,
        "dtype": "torch.float32",
        "hook_point": "blocks.2.hook_resid_pre",
        "model_name": "gpt2-small",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "context_size": 128,
    }
    (folder / CFG).write_text(json.dumps(config))
    tensors = load_file(folder / WEIGHTS) | {"scaling_factor": torch.ones(H)}
    save_file(tensors, folder / WEIGHTS)


def test_configurations_before_saelens_6(tmp_path: Path) -> None:
    old_format(tmp_path)
    ours = load_sae(tmp_path)
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))
    assert ours.architecture == "topk" and ours.k == K and ours.apply_b_dec_to_input
    assert ours.space == Space("resid_post", 1)
    assert ours.metadata.prepend_bos is True and ours.metadata.context_size == 128


def edited(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / CFG).read_text())
    (folder / CFG).write_text(json.dumps(config | {key: value}))


def reweighed(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / CFG).unlink(), r"cfg\.json.*no such file"),
        (lambda f: (f / WEIGHTS).unlink(), r"sae_weights\.safetensors.*no such file"),
        (lambda f: (f / CFG).write_text("{"), r"cfg\.json.*no JSON"),
        (lambda f: (f / CFG).write_text("[]"), r"cfg\.json.*list"),
        (lambda f: (f / WEIGHTS).write_bytes(b"broken"), r"safetensors.*damaged"),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
            r"safetensors.*damaged",
        ),
        (lambda f: reweighed(f, b_enc=None), r"safetensors, b_enc"),
        (lambda f: reweighed(f, other=torch.ones(2)), r"safetensors, other"),
        (lambda f: reweighed(f, b_dec=torch.ones(D + 1)), r"b_dec.*shape"),
        (lambda f: reweighed(f, b_dec=torch.full((D,), torch.nan)), "b_dec.*not finite"),
        (lambda f: reweighed(f, W_enc=torch.ones(D, H + 1)), r"cfg\.json, d_sae"),
        (lambda f: reweighed(f, scaling_factor=2 * torch.ones(H)), "scaling_factor"),
        (lambda f: edited(f, "k", "many"), r"cfg\.json, k"),
        (lambda f: edited(f, "k", H + 1), ", k"),
        (lambda f: edited(f, "d_in", D + 1), r"cfg\.json, d_in"),
        (lambda f: edited(f, "architecture", "other"), r"cfg\.json, architecture"),
        (lambda f: edited(f, "normalize_activations", "layer_norm"), "normalize_activations"),
        (
            lambda f: edited(f, "normalize_activations", "expected_average_only_in"),
            "normalize_activations",
        ),
        (lambda f: edited(f, "reshape_activations", "hook_z"), "reshape_activations"),
    ],
)
def test_malformed_folders(spoil: Any, words: str, tmp_path: Path) -> None:
    training_sae("topk").save_inference_model(tmp_path)
    load_sae(tmp_path)
    spoil(tmp_path)
    with pytest.raises((CheckpointError, MismatchError), match=words) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in caught.value.subject and caught.value.remedy


def test_sources_that_are_none(tmp_path: Path) -> None:
    for source, words in (
        (tmp_path / "nowhere", "no such file"),
        ("no-such-release:id", "not found in pretrained"),
        ("gpt2-small-res-jb:no-such-id", "not found in release"),
        (object(), "none of SAELens'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_sae(source)


def test_the_seed_experiment_names_a_registered_sae() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, sae_id = sae_io.SEED_EXPERIMENT.partition(":")
    found = get_pretrained_saes_directory()[release]
    assert sae_id in found.saes_map and found.model == "google/gemma-3-1b-it"
    assert found.expected_l0[sae_id] == 60


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", unreachable)
    with pytest.raises(CheckpointError, match=r"no route.*network"):
        load_sae(sae_io.SEED_EXPERIMENT)


def test_a_release_is_loaded_through_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, asked = inference_sae("jumprelu"), []

    def fake(release: str, sae_id: str, **_: Any) -> Any:
        asked.append((release, sae_id))
        return theirs

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fake)
    ours = load_sae(sae_io.SEED_EXPERIMENT)
    assert asked == [("gemma-scope-2-1b-it-res", "layer_13_width_16k_l0_medium")]
    assert ours.metadata.source == sae_io.SEED_EXPERIMENT
    assert_same(ours, theirs)


def test_without_saelens_folders_are_read_and_releases_refused(tmp_path: Path) -> None:
    """In a process where the import fails as it does beside TransformerLens 4."""
    theirs = training_sae("jumprelu")
    theirs.save_inference_model(tmp_path)
    x = points()
    codes = theirs.encode(x).detach().contiguous()
    save_file({"x": x, "codes": codes}, tmp_path / "expected.safetensors")
    script = """
        import sys
        from pathlib import Path
        from safetensors.torch import load_file
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"sae_lens", "transformer_lens"}:
                    raise ImportError(f"blocked {name}")
        sys.meta_path.insert(0, Block())
        import probes.sae_io as io
        from mi_weightspace.core.errors import CheckpointError
        folder = Path(sys.argv[1])
        sae, expected = io.load_sae(folder), load_file(folder / "expected.safetensors")
        assert (sae.encode(expected["x"]) - expected["codes"]).abs().max() < 1e-6
        io.save_sae(sae, folder / "copy")
        io.load_sae(folder / "copy")
        for act in (lambda: io.load_sae(io.SEED_EXPERIMENT), lambda: io.to_saelens(sae)):
            try:
                act()
            except CheckpointError as error:
                assert "mi-weightspace[sae]" in error.remedy and "blocked" in error.given
            else:
                raise AssertionError("not refused")
        print("done")
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr


def test_a_half_written_folder_does_not_load(tmp_path: Path) -> None:
    ours = load_sae(training_sae("standard"))
    save_sae(ours, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / CFG).unlink()  # written last
    with pytest.raises(WeightspaceError):
        load_sae(str(tmp_path / "b"))


def test_an_sae_is_returned_as_it_is() -> None:
    ours = load_sae(training_sae("gated"))
    assert load_sae(ours) is ours
    assert ours.metadata != SaeMetadata()
