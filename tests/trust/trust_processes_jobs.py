"""What the lives of `trust_processes_lives` do: every command that writes, on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main as command_line
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.sae import Sae, SaeMetadata
from mi_weightspace.models import toy
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.load import load, without_bars
from mi_weightspace.organisms.build import cached, recipe
from probes.labelled_io import labelled_to_jsonl
from probes.sae_disk import read_folder
from probes.sae_io import save_sae
from probes.sae_train import train_sae

VPD_SETTINGS = """\
n_components: 32
n_steps: 6
batch_size: 2
warmup_steps: 2
log_every: 1
checkpoint_every: 2
importance: {hidden: [8]}
"""
DIFF_SETTINGS = """\
n_components: 2
n_steps: 3
batch_size: 4
checkpoint_every: 2
importance: {kind: layerwise_mlp, hidden: [4]}
"""
CHANGED = "blocks.1.mlp.out"


# ---- what is read ------------------------------------------------------------------------------
def ground(folder: Path) -> Path:
    """Tiny checkpoints, prompts, tokens, an SAE, and runs of probe and svd."""
    for seed, stage in enumerate(("base", "sft", "clean")):
        toy.save_tiny("llama", folder / stage, seed=seed)
    toy.save_tiny("gpt2", folder / "gpt2", seed=0)
    changed = toy.tiny_model("llama", seed=0)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.add_(0.3)
    toy.save_tiny("llama", folder / "changed", seed=0)
    changed.save_pretrained(folder / "changed")
    draw = random.Random(0)
    contrasts = (contrast("target", "target", draw),
                 *(contrast(f"c{i}", "control", draw) for i in range(3)))  # fmt: skip
    probes.to_jsonl(ContrastSet("set", contrasts), folder / "prompts.jsonl")
    rows = [LabelledPrompt(words(draw), i % 2, f"c{i}", f"i{i}") for i in range(24)]
    labelled_to_jsonl(LabelledSet(tuple(rows), "rows"), folder / "rows.jsonl")
    save_sae(axes(toy.tiny_model("llama").config.hidden_size), folder / "sae")
    for name, seed in (("ids", 0), ("broad", 1)):
        ids = np.random.default_rng(seed).integers(4, 300, (12 + 4 * seed, 8))
        np.save(folder / f"{name}.npy", ids)
    (folder / "vpd.yaml").write_text(VPD_SETTINGS)
    (folder / "diff.yaml").write_text(DIFF_SETTINGS)
    assert probe(folder, folder / "runs" / "probe") == 0
    assert sweep(folder, folder / "runs" / "svd") == 0
    return folder


def words(draw: random.Random) -> str:
    return " ".join(f"word{draw.randrange(40)}" for _ in range(4)) + " word1 word2"


def contrast(name: str, kind: Any, draw: random.Random) -> Contrast:
    readout = ("word3", "word4") if kind == "target" else ()
    pairs = (
        Pair(f"i{i}", words(draw), words(draw), wording_id=f"v{i % 2}", readout=readout)
        for i in range(8)
    )
    return Contrast(name, kind, tuple(pairs))


def axes(width: int) -> Sae:
    """Latents along the coordinates, either sign."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return Sae(
        architecture="topk",
        W_enc=both.T.contiguous(),
        W_dec=both,
        b_enc=torch.zeros(2 * width),
        b_dec=torch.zeros(width),
        k=8,
        metadata=SaeMetadata(hook_name="blocks.1.hook_resid_post"),
    )


# ---- what is run -------------------------------------------------------------------------------
def said(*arguments: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return command_line([str(a) for a in arguments])


def dmu(given: Path, out: Path) -> int:
    return said("dmu", given / "base", given / "sft", "--prompts", given / "prompts.jsonl",
                "--quiet", "--out", out)  # fmt: skip


def probe(given: Path, out: Path) -> int:
    return said("probe", given / "base", "--prompts", given / "prompts.jsonl", "--quiet",
                "--out", out)  # fmt: skip


def gate(given: Path, out: Path) -> int:
    direction = given / "runs" / "probe" / "direction.safetensors"
    return said("gate", given / "base", "--direction", direction, "--prompts",
                given / "prompts.jsonl", "--layer", 0, "--n-null", 9, "--alphas", "0.5",
                "--quiet", "--out", out)  # fmt: skip


def sweep(given: Path, out: Path) -> int:
    sites = "blocks.*.mlp.*"
    return said("svd", given / "base", given / "sft", "--sites", sites, "--rank", 3, "--resume",
                "--quiet", "--out", out)  # fmt: skip


def shared(given: Path, out: Path) -> int:
    """`sweep` with two worker processes, where refusals come from."""
    return said("svd", given / "base", given / "sft", "--sites", "blocks.*.mlp.*", "--rank", 3,
                "--jobs", 2, "--resume", "--quiet", "--out", out)  # fmt: skip


def project(given: Path, out: Path) -> int:
    direction = given / "runs" / "probe" / "direction.safetensors"
    return said("project", given / "runs" / "svd", "--direction", direction, "--n-null", 99,
                "--quiet", "--out", out)  # fmt: skip


def inoculation(given: Path, out: Path) -> int:
    return said("inoculation", given / "base", given / "sft", "--clean", given / "clean",
                "--prompts", given / "rows.jsonl", "--sae", given / "sae", "--n-splits", 1,
                "--n-permutations", 19, "--k", 3, "--position", "last", "--quiet",
                "--out", out)  # fmt: skip


def vpd(given: Path, out: Path) -> int:
    return said("vpd", given / "gpt2", "--tokens", given / "ids.npy", "--sites", "blocks.1.attn.v",
                "--ladder", 2, "--config", given / "vpd.yaml", "--quiet", "--resume",
                "--out", out)  # fmt: skip


def diff(given: Path, out: Path) -> int:
    return said("vpd", given / "base", given / "changed", "--diff", "--tokens", given / "ids.npy",
                "--broad", given / "broad.npy", "--sites", CHANGED, "--ladder", 2, "--config",
                given / "diff.yaml", "--quiet", "--resume", "--out", out)  # fmt: skip


def sae(given: Path, out: Path) -> int:
    lens = TorchLens(toy.tiny_model("llama"), None)
    draw = torch.Generator().manual_seed(5)
    ids = [tuple(torch.randint(20, 60, (9,), generator=draw).tolist()) for _ in range(40)]
    train_sae(lens, ids, "resid_post.1", d_sae=48, steps=30, batch=64, checkpoint_every=6,
              folder=out, resume=True, progress=False)  # fmt: skip
    return 0


def page(given: Path, out: Path) -> int:
    runs = given / "runs"
    return said("report", runs / "svd", runs / "probe", "--out", out / "page.html")


def replay(given: Path, out: Path) -> int:
    return said("replay", given / "runs" / "probe", "--quiet", "--out", out)


def save(given: Path, out: Path) -> int:
    mw.load_report(given / "runs" / "svd").save(out)
    return 0


def organism(given: Path, out: Path) -> int:
    """The cache of organisms; one that is saved, and not trained."""

    def write(key: str, folder: Path, tick: object) -> None:
        with without_bars():
            toy.save_tiny("llama", folder / "base", seed=0)
        (folder / "truth.json").write_text(json.dumps({"key": key}))

    cached(recipe("deference"), "micro", 0, out, write, progress=False)
    return 0


def demo(given: Path, out: Path) -> int:
    """Only for places where it is refused: it trains for minutes."""
    return said("demo", "--quiet", "--out", out)


def loaded_report(out: Path) -> object:
    return mw.load_report(out)


def loaded_page(out: Path) -> object:
    """A page that is whole."""
    for path in out.glob("*.html"):
        if path.is_file() and path.read_text("utf-8", "replace").rstrip().endswith("</html>"):
            return path
    raise OutputError(f"page in {out}", given="none", expected="one", remedy="Write it.")


def loaded_organism(out: Path) -> object:
    if not (out / "truth.json").is_file():
        raise OutputError(f"organism {out}", given="none", expected="one", remedy="Build it.")
    return load(out / "base")


@dataclass(frozen=True)
class Job:
    """Something to kill.

    Attributes:
        run: (ground, output folder) -> exit code; goes on with what is in the folder.
        read: loads a finished folder; refuses any other.
        again: run on a finished folder it returns what is there.
    """

    run: Callable[[Path, Path], int]
    read: Callable[[Path], object] = loaded_report
    again: bool = False


JOBS = {
    "sweep": Job(sweep),
    "probe": Job(probe),
    "sae": Job(sae, read_folder, again=True),
    "vpd": Job(vpd, again=True),
    "dmu": Job(dmu),
    "gate": Job(gate),
    "project": Job(project),
    "inoculation": Job(inoculation),
    "diff": Job(diff, again=True),
    "replay": Job(replay),
    "page": Job(page, loaded_page),
    "save": Job(save),
    "shared": Job(shared),
    "organism": Job(organism, loaded_organism, again=True),
    "demo": Job(demo),
}
