"""Synthetic reports for the page's tests: a finding, a null, and hostile strings."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word

KINDS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")
HOSTILE = "<script>alert(1)</script></script><img src=http://evil.example/x onerror=alert(2)>"


def report(kind: str, table: pd.DataFrame, **fields: object) -> Report:
    from mi_weightspace.core.report import _known_kinds

    cls = _known_kinds().get(kind)
    if cls is None:
        cls = type(f"Example{kind.capitalize()}", (Report,), {"kind": kind})
    return cls(table=table, **fields)  # pyright: ignore[reportArgumentType]


def attribution(*, found: bool, n_layers: int = 6, label: str = "authority") -> Report:
    rng = np.random.default_rng(int(found))
    rows, path = [], []
    for stage in ("sft", "dpo"):
        for layer in range(n_layers):
            for kind in KINDS:
                hit = found and stage == "sft" and (layer, kind) == (2, "mlp.out")
                writes = kind in ("attn.o", "mlp.out")
                site = f"blocks.{layer}.{kind}"
                g = (1.31 if hit else rng.normal(0, 0.08)) if writes else np.nan
                p = (0.01 if hit else rng.uniform(0.2, 1)) if writes else np.nan
                rows.append(
                    {
                        "stage": stage,
                        "site": site,
                        "layer": layer,
                        "kind": kind,
                        "side": "write" if writes else "read",
                        "direction": f"{label}@resid_post.{layer}",
                        "cosine": 0.94 if hit else rng.normal(0, 0.1),
                        "R": 9.0 if hit else rng.uniform(0.6, 1.4),
                        "R_lda": 7.1 if hit else rng.uniform(0.6, 1.4),
                        "p_lda_rank": 0.01 if hit else rng.uniform(0.2, 1),
                        "G": g,
                        "p_G": p,
                        "p_adjusted": p,
                        "n_controls": 99,
                        "null_edge": 0.2,
                        "path_share": 2.4 if hit else rng.normal(0, 0.05),
                        "carries": hit,
                        "verdict": str(Word.WRITTEN_HERE if hit else Word.NOT_SIGNIFICANT),
                    }
                )
                path.append(
                    {
                        "stage": stage,
                        "site": site,
                        "path_share": rows[-1]["path_share"],
                        "revert_effect": 2.6 if hit else np.nan,
                        "add_effect": 2.2 if hit else np.nan,
                        "carries": hit,
                        "readout_before": -1.0,
                        "readout_after": 1.7 if found and stage == "sft" else -0.95,
                        "completeness_error": 0.012,
                        "n_prompts": 64,
                    }
                )
    word = Word.WRITTEN_HERE if found else Word.NOT_SIGNIFICANT
    stages = pd.DataFrame(
        {
            "stage": ["sft", "dpo"],
            "previous": ["base", "sft"],
            "gate_statistic": [2.9 if found else 0.21, 0.08],
            "gate_p": [0.01 if found else 0.44, 0.61],
            "onset": ["resid_post.2" if found else "", ""],
            "n_controls": 99,
            "top_carrier": ["blocks.2.mlp.out", "blocks.1.attn.o"],
            "written_sites": ["blocks.2.mlp.out" if found else "", ""],
            "readout_before": [-1.0, -0.95],
            "readout_after": [1.7 if found else -0.95, -0.95],
            "verdict": [str(word), str(Word.NOT_SIGNIFICANT)],
        }
    )
    points = [p for i in range(n_layers) for p in (f"resid_mid.{i}", f"resid_post.{i}")]
    gate = pd.DataFrame(
        [
            {
                "stage": stage,
                "point": point,
                "relative_did": (2.9 if found and stage == "sft" and i > 4 else 0.1)
                * rng.uniform(0.8, 1.0),
                "control_median": 0.1,
                "control_q95": 0.25,
                "control_max": 0.3 + 0.02 * i,
                "n_controls": 99,
            }
            for stage in ("sft", "dpo")
            for i, point in enumerate(points)
        ]
    )
    controls = pd.DataFrame(
        [
            {
                **{k: row[k] for k in ("stage", "site", "layer", "side", "direction")},
                "control": name,
                "R_lda": row["R_lda"] if name == "" else rng.uniform(0.5, 2.0),
            }
            for row in rows
            for name in ("", *(f"control-{i}" for i in range(19)))
        ]
    )
    verdicts = [
        Verdict(word, "sft / blocks.2.mlp.out" if found else "sft", {"gate_p": 0.01}),
        Verdict(Word.NOT_SIGNIFICANT, "dpo", {"gate_p": 0.61}, ("The prompts are synthetic.",)),
    ]
    return report(
        "attribution",
        pd.DataFrame(rows),
        tables={"stages": stages, "gate": gate, "path": pd.DataFrame(path), "controls": controls},
        verdicts=tuple(verdicts),
        config={"command": "attribute", "args": {"seed": 0}},
        inputs={"base": "a" * 16, "sft": "b" * 16},
        reservations=(f"The direction {label} was fitted on 32 pairs.",),
        timings={"path": 3.2, "gate": 1.1},
    )


def dmu(*, found: bool, n_layers: int = 6, label: str = "authority") -> Report:
    rng = np.random.default_rng(10 + int(found))
    rows = []
    for contrast in (label, "formality", "neutral", *(f"control-{i}" for i in range(39))):
        control = contrast.startswith("control-")
        for stage in ("base", "sft", "dpo"):
            for layer in range(n_layers):
                size = rng.uniform(0.05, 0.2) * (0.1 if contrast == "neutral" else 1.0)
                size += 0.5 if found and contrast == label and stage != "base" and layer > 1 else 0
                p = 0.001 if size > 0.3 else rng.uniform(0.06, 1)
                rows.append(
                    {
                        "stage": stage,
                        "contrast": contrast,
                        "is_control": control,
                        "kind": "control"
                        if control
                        else ("null" if contrast == "neutral" else "target"),
                        "layer": layer,
                        "point": f"resid_post.{layer}",
                        "n": 32,
                        "delta_norm": size * 12,
                        "rel_delta": size,
                        "ci_low": size - 0.04,
                        "ci_high": size + 0.05,
                        "p": p / 2,
                        "p_adjusted": p,
                        "above_controls": size > 0.3,
                    }
                )
    word = Word.AXIS_SPECIFIC if found else Word.UNDERPOWERED
    return report("dmu", pd.DataFrame(rows), verdicts=(Verdict(word, f"sft / {label}"),))


def svd(*, found: bool, n_layers: int = 6) -> Report:
    rng = np.random.default_rng(20)
    rows = []
    for stage in ("sft", "dpo"):
        for layer in range(n_layers):
            for kind in KINDS:
                still = kind == "attn.k" or not found
                size = 0.0 if still else 10 ** rng.normal(-2, 0.2)
                for component in range(8):
                    rows.append(
                        {
                            "stage": stage,
                            "site": f"blocks.{layer}.{kind}",
                            "layer": layer,
                            "kind": kind,
                            "d_out": 64,
                            "d_in": 64,
                            "fro": size * 30,
                            "rel_fro": size,
                            "rounding_floor": 2e-4,
                            "component": component,
                            "singular_value": size * 20 * 0.6**component,
                            "above_floor": not still,
                        }
                    )
    verdicts = () if found else (Verdict(Word.NO_CHANGE, "sft"), Verdict(Word.NO_CHANGE, "dpo"))
    return report("svd", pd.DataFrame(rows), verdicts=verdicts)


def check(*, found: bool) -> Report:
    table = pd.DataFrame(
        {
            "stage": ["base", "sft", "dpo"],
            "model": ["runs/base", "runs/sft", "runs/dpo"],
            "n_matrices": 42,
            "finite": True,
            "changed_matrices": [0, 42 if found else 0, 42 if found else 0],
            "relative_change": [np.nan, 0.012 if found else 0.0, 0.004 if found else 0.0],
        }
    )
    return report("check", table, inputs={"base": "a" * 16})


def probe(*, found: bool, n_layers: int = 6) -> Report:
    layers = np.arange(n_layers)
    auroc = 0.5 + (0.45 if found else 0.05) * layers / n_layers
    table = pd.DataFrame(
        {
            "layer": layers,
            "auroc": auroc,
            "auroc_low": auroc - 0.06,
            "auroc_high": np.minimum(1, auroc + 0.05),
            "p_adjusted": np.where(auroc > 0.7, 0.001, 0.4),
            "n_clusters": 32,
        }
    )
    return report("probe", table)


def everything(*, found: bool, n_layers: int = 6, label: str = "authority") -> list[Report]:
    size = {"found": found, "n_layers": n_layers}
    return [
        attribution(**size, label=label),
        check(found=found),
        dmu(**size, label=label),
        probe(**size),
        svd(**size),
    ]
