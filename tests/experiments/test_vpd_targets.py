"""Targets whose mechanisms are known really have them, and the script that scores against them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import vpd_ground_truth
from experiments.vpd_ground_truth import GroundTruthConfig
from experiments.vpd_targets import bilinear, control, docstrings, induction, resid_mlp, tms
from experiments.vpd_targets.catalogue import TARGETS, make_target
from experiments.vpd_targets.presets import DECOMPOSITIONS
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.truth import Identity

TMS = replace(tms.PRESETS["tms_5_2"]["toy"], steps=1_000, batch_size=512)
RESID = replace(resid_mlp.PRESETS["resid_mlp_2"]["toy"], steps=500)
INDUCTION = replace(induction.PRESETS["induction"]["toy"], steps=600, batch_size=64)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (tms, replace(TMS, steps=20)),
        (resid_mlp, replace(RESID, steps=20)),
        (induction, replace(INDUCTION, steps=3)),
        (bilinear, bilinear.PRESETS["bilinear"]["toy"]),
        (control, control.PRESETS["control"]["toy"]),
    ],
)
def test_a_target_is_a_function_of_its_seed(module: Any, config: Any) -> None:
    before = torch.get_rng_state()
    with vpd_ground_truth.one_thread():  # products of several threads may add up in another order
        made = module.train(config, 0)
        assert same(made, module.train(config, 0))
        assert not same(made, module.train(config, 1))
    assert not any(p.requires_grad for p in made.parameters())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("size", ["toy", "paper"])
def test_every_target_has_every_preset_and_the_engine_takes_them(name: str, size: str) -> None:
    assert size in TARGETS[name].PRESETS[name]
    assert {"toy", "short", "paper"} <= DECOMPOSITIONS[name].keys()
    for preset, values in DECOMPOSITIONS[name].items():
        make_config(values, f"{name}/{preset}")


def test_published_sizes_and_schedules() -> None:
    tms_5_2 = make_config(DECOMPOSITIONS["tms_5_2"]["paper"])
    assert (tms_5_2.n_components, tms_5_2.n_steps, tms_5_2.batch_size) == (20, 40_000, 4_096)
    assert (tms_5_2.minimality.p, tms_5_2.minimality.weight) == ((1.0, 1.0), 3e-3)
    short = [DECOMPOSITIONS[n]["short"] for n in ("tms_5_2", "tms_40_10", "resid_mlp_1")]
    assert [(s["n_steps"], s["batch_size"]) for s in short] == [
        (7_500, 1_024),
        (12_500, 1_024),
        (7_000, 512),
    ]
    published = resid_mlp.PRESETS["resid_mlp_3"]["paper"]
    assert (published.n_features, published.n_neurons, published.d_embed) == (102, 51, 1_000)


# ---- toy model of superposition --------------------------------------------------------------


def test_tms_represents_all_features_tied_and_untied() -> None:
    target = tms.target(replace(TMS, hidden=True), 0)
    module = target.module
    assert isinstance(module, tms.Tms)
    assert target.quality["represented"] == 5
    assert target.quality["relative_loss"] < 0.15
    assert float(module.linear2.bias.max()) < -0.05  # silences the neighbours
    assert torch.equal(module.linear2.weight, module.linear1.weight.T)
    assert module.linear2.weight.data_ptr() != module.linear1.weight.data_ptr()
    assert torch.equal(target.weight("hidden"), torch.eye(2))
    w, b = (t.double().numpy() for t in (module.linear1.weight, module.linear2.bias))
    x = tms.sample(TMS, 50, draws()).double().numpy()
    expected = np.maximum(x @ w.T @ w + b, 0)
    found = module(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    angles = np.sort(np.degrees(np.arctan2(w[1], w[0])))  # a regular pentagon
    np.testing.assert_allclose(np.diff(angles), 72, atol=3)


def test_a_target_that_drops_a_feature_is_noticed_and_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    square = torch.tensor([[1.0, -1, 0, 0, 0], [0, 0, 1, -1, 0]])  # two antipodal pairs
    poor = tms.Tms(square, torch.zeros(5))
    assert tms.represented(poor) == [0, 1, 2, 3]
    confused = torch.tensor([[1.0, 1, 0], [0, 0, 1]])  # two features on one direction
    assert tms.represented(tms.Tms(confused, torch.zeros(3))) == [2]
    faint = torch.tensor([[0.5, 0], [0, 1]])
    assert tms.represented(tms.Tms(faint, torch.zeros(2))) == [1]
    good = tms.train(TMS, 0)
    made = iter([poor, poor, good])
    monkeypatch.setattr(tms, "train", lambda *_: next(made))
    module, attempt = tms.train_all_features(TMS, 0)
    assert (module is good, attempt) == (True, 2)
    monkeypatch.setattr(tms, "train", lambda *_: poor)
    with pytest.raises(RuntimeError, match="none of 3"):
        tms.train_all_features(TMS, 0, attempts=3)


@pytest.mark.parametrize(
    ("x", "probability", "low", "mean"),
    [
        (tms.sample(tms.TmsConfig(), 40_000, draws()), 0.05, 0.0, 0.5),
        (resid_mlp.sample(resid_mlp.ResidMlpConfig(), 4_000, draws()), 0.01, -1.0, 0.0),
    ],
)
def test_sparse_data_laws(x: Tensor, probability: float, low: float, mean: float) -> None:
    on = x != 0
    assert float(on.double().mean()) == pytest.approx(probability, rel=0.05)
    assert float(x[on].mean()) == pytest.approx(mean, abs=0.02)
    assert low <= float(x.min()) < low + 0.01
    assert float(x.max()) > 0.99
    together = (on[:, 0] & on[:, 1]).double().mean()
    assert float(together) == pytest.approx(probability**2, abs=2e-3)


# ---- residual MLP ----------------------------------------------------------------------------


def test_resid_mlp_trains_what_it_runs_and_computes_every_feature() -> None:
    module = resid_mlp.train(RESID, 0)
    x = resid_mlp.sample(RESID, 64, draws())
    layers = [
        (module.get_parameter(f"layers.{i}.mlp_in.weight"), p)
        for i in range(2)
        for p in [module.get_parameter(f"layers.{i}.mlp_out.weight")]
    ]
    found = resid_mlp.readoff(x, module.embedding, layers)
    torch.testing.assert_close(found, module(x), atol=1e-5, rtol=1e-4)
    # written out, in float64
    h = x.double() @ module.embedding.double()
    for mlp_in, mlp_out in layers:
        h = h + (h @ mlp_in.double().T).clamp_min(0) @ mlp_out.double().T
    expected = h @ module.embedding.double().T
    torch.testing.assert_close(module(x).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module.embedding.norm(dim=1), torch.ones(20))
    untrained = resid_mlp.quality(resid_mlp.train(replace(RESID, steps=1), 0), RESID, 0)
    trained = resid_mlp.quality(module, RESID, 0)
    assert trained["relative_loss"] < 0.6 < untrained["relative_loss"]
    assert trained["computed"] == 20 > untrained["computed"]


# ---- bilinear --------------------------------------------------------------------------------


def test_bilinear_interactions_have_the_stated_eigenvectors() -> None:
    config = bilinear.BilinearConfig()
    structure, module = bilinear.build(config, 3), bilinear.train(config, 3)
    used = structure.basis[: config.n_used].double().numpy()
    x = torch.randn(20, config.d_in, generator=draws(), dtype=torch.float64)
    y = module.double()(x).numpy()
    for k in range(config.n_used):
        # the quadratic form of output k, from the weights by loops over neurons
        b = np.zeros((config.d_in, config.d_in))
        for h in range(config.n_used * config.group):
            left, right = module.left.weight[h].numpy(), module.right.weight[h].numpy()
            b += float(module.down.weight[k, h]) * np.outer(left, right)
        b = (b + b.T) / 2
        np.testing.assert_allclose(np.einsum("ni,ij,nj->n", x, b, x), y[:, k], atol=1e-5)
        values, vectors = np.linalg.eigh(b)
        large = np.abs(values) > 1e-4
        assert large.sum() == config.spread
        stated = {i for i in range(config.n_used) if structure.eigenvalues[k, i] != 0}
        overlap = np.abs(vectors[:, large].T @ used.T)  # each found vector is one stated e_i
        np.testing.assert_allclose(overlap.max(1), 1, atol=1e-4)
        assert set(overlap.argmax(1)) == stated
    assert bilinear.eigen_error(module, structure) < 1e-5


def test_bilinear_parts_sum_to_the_matrices_and_svd_cannot_tell_them() -> None:
    config = bilinear.BilinearConfig()
    structure, module = bilinear.build(config, 0), bilinear.train(config, 0)
    for site in bilinear.SITES:
        parts = structure.parts[site]
        whole = sum(torch.outer(w, r) for w, r in zip(parts.write, parts.read, strict=True))
        torch.testing.assert_close(module.get_submodule(site).weight, whole)
    for site in ("left", "right"):
        values = torch.linalg.svdvals(module.get_submodule(site).weight)
        torch.testing.assert_close(values[: config.n_used], torch.ones(config.n_used))
    # one eigenvector on: taking its part out loses everything, taking all others out nothing
    target = bilinear.target(config, 0)
    assert target.probe is not None
    x = target.probe[4]
    parts = structure.parts["left"]
    alone = torch.outer(parts.write[4], parts.read[4])
    left, right = alone @ x, module.right(x)
    torch.testing.assert_close(module.down(left * right), module(x))
    assert float(module(x).norm()) > 0.1
    assert float(module(target.probe[13]).norm()) < 1e-6  # idle
    assert target.patterns["left"] == Identity(idle=(12, 13, 14, 15))


def test_bilinear_inputs_are_sparse_in_the_basis() -> None:
    config = bilinear.BilinearConfig()
    structure = bilinear.build(config, 0)
    s = bilinear.sample(config, structure, 5_000, draws()) @ structure.basis.T
    on = s.abs() > 0.25
    assert float(on.double().mean()) == pytest.approx(config.probability, rel=0.05)
    assert float(s[on].abs().min()) > 0.499
    assert float(s[~on].abs().max()) < 1e-5


# ---- control ---------------------------------------------------------------------------------


def test_control_needs_every_direction_on_every_input_and_one_matrix_never() -> None:
    target = control.target(control.ControlConfig(), 0)
    x = target.sample(2_000, draws())
    read = target.weight("dense")
    # the share of output energy that each of d orthogonal parts carries is the same for all
    energy = (x @ read.T).square().mean(0)
    assert float(energy.min() / energy.sum()) > 0.8 / 16
    y = target.module(x)
    target.module.get_submodule("unused").weight.mul_(7)  # pyright: ignore
    assert torch.equal(target.module(x), y)
    assert control.expected_l0(control.ControlConfig()) == {"dense": 16.0, "unused": 0.0}
    zero = control.train(control.ControlConfig(zero_matrix=True), 0)
    assert int(zero.unused.weight.count_nonzero()) == 0


# ---- induction -------------------------------------------------------------------------------


def test_induction_sequences_repeat_a_block_of_distinct_tokens() -> None:
    config = induction.InductionConfig()
    tokens, size = induction.sample_with_block(config, 200, draws())
    assert set(size.tolist()) == set(range(config.shortest, config.longest + 1))
    mask = induction.predictable(config, size)
    for row, n, known in zip(tokens.tolist(), size.tolist(), mask.tolist(), strict=True):
        assert len(set(row[:n])) == n
        assert row == [row[i % n] for i in range(config.length)]
        assert known == [row[i] in row[:i] for i in range(config.length - 1)]


def test_induction_is_learned_by_the_stated_circuit() -> None:
    module = induction.train(INDUCTION, 0)
    found = induction.quality(module, INDUCTION, 0)
    # layer 1 looks at what followed the same token, and finds it by what layer 0 copied
    assert induction.is_stated_circuit(found)
    assert not induction.is_stated_circuit(found | {"previous": 0.01})  # solved in another way
    untrained = induction.quality(induction.train(replace(INDUCTION, steps=1), 0), INDUCTION, 0)
    assert untrained["accuracy"] < 0.3 > untrained["previous"]
    # without layer 0's attention the second layer has nothing to match
    module.get_submodule("layers.0.o").weight.zero_()  # pyright: ignore
    assert induction.quality(module, INDUCTION, 0)["accuracy"] < 0.5


def test_induction_attention_is_causal() -> None:
    module = induction.train(replace(INDUCTION, steps=1), 0)
    tokens = induction.sample(INDUCTION, 4, draws())
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % INDUCTION.vocab
    torch.testing.assert_close(module(tokens)[:, :9], module(changed)[:, :9])
    assert not torch.allclose(module(tokens)[:, 9:], module(changed)[:, 9:])


# ---- documentation strings -------------------------------------------------------------------

LANGUAGE = replace(docstrings.PRESETS["toy"], steps=60)


@pytest.fixture(scope="module")
def corpus() -> docstrings.Corpus:
    return docstrings.build_corpus(LANGUAGE)


def test_docstrings_of_a_file_in_order(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        '"""Top."""\nclass A:\n    """A."""\n    def f(self):\n        """F."""\n'
        "def g():\n    pass\nasync def h():\n    '''H\n    two.'''\n"
    )
    assert list(docstrings.docstrings_of(path)) == ["Top.", "A.", "F.", "H\ntwo."]
    path.write_text("def broken(:\n")
    assert list(docstrings.docstrings_of(path)) == []


def test_no_document_and_no_string_is_in_both_parts() -> None:
    found = docstrings.documents(30)
    strings = [text for texts in found.values() for text in texts]
    assert len(strings) == len(set(strings))
    assert list(found) == sorted(found)[: len(found)] or len(found) == 30
    import abc

    assert any((abc.ABC.__doc__ or "!").strip()[:40] in text for text in found["abc"])
    held = [name for name in found if docstrings.is_held_out(name, 0.5)]
    assert 5 < len(held) < 25
    assert not any(docstrings.is_held_out(name, 0.0) for name in found)


def test_corpus_blocks_decode_to_the_text(corpus: docstrings.Corpus) -> None:
    assert corpus.train.shape[1] == LANGUAGE.length
    assert not set(corpus.names["train"]) & set(corpus.names["held_out"])
    assert len(corpus.tokenizer) <= LANGUAGE.vocab
    text = corpus.tokenizer.decode(corpus.train.flatten().tolist())
    first = docstrings.documents(LANGUAGE.max_documents)[corpus.names["train"][0]][0]
    assert text.startswith(docstrings.SEPARATOR + first[:200])
    again = docstrings.build_corpus(LANGUAGE)
    assert torch.equal(again.train, corpus.train)
    assert (
        corpus.tokenizer.decode(corpus.tokenizer("naïve §4\n\tx")["input_ids"]) == "naïve §4\n\tx"
    )


def test_unigram_loss_is_the_written_out_one() -> None:
    train, held_out = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[3, 1, 0]])
    expected = -(math.log(3 / 8) + math.log(2 / 8)) / 2
    assert docstrings.unigram_loss(train, held_out, 4) == pytest.approx(expected)


def test_batches_visit_every_row_once_an_epoch() -> None:
    order = docstrings.epochs(10, 4, 0)
    rows = torch.cat([next(order) for _ in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_other_shapes_train(corpus: docstrings.Corpus, family: Any) -> None:
    config = replace(LANGUAGE, family=family, steps=15)
    before = torch.get_rng_state()
    model, curve = docstrings.train_language_model(config, corpus, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.model_type == family
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["step"] == 15


def test_a_saved_model_is_whole_and_beats_the_unigram(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "lm"
    facts = docstrings.build(LANGUAGE, out, progress=False)
    assert facts["held_out_loss"] < facts["unigram_loss"] < facts["uniform_loss"]
    model = AutoModelForCausalLM.from_pretrained(out)
    tokens = docstrings.load_tokens(out)
    loss = docstrings.held_out_loss(model.eval(), tokens["held_out"])
    assert loss == pytest.approx(facts["held_out_loss"], rel=1e-4)
    assert len(AutoTokenizer.from_pretrained(out)) == len(
        docstrings.build_corpus(LANGUAGE).tokenizer
    )
    assert json.loads((out / "training.json").read_text())["tokens"]["train"] > 1_000
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]
    with pytest.raises(FileExistsError):
        docstrings.build(LANGUAGE, out, progress=False)


# ---- the script ------------------------------------------------------------------------------


def test_ground_truth_rows_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpd_ground_truth, "N_EVALUATION", 256)
    config = GroundTruthConfig("bilinear", "toy", seeds=(0,), overrides={"n_steps": 20})
    table = vpd_ground_truth.run(config, tmp_path, progress=False)
    row = table.iloc[0]
    assert row["ci_error_0.1"] >= row["ci_error_0.2"] > 0  # 20 steps find nothing
    assert 0 < row["mmcs"] <= 1
    assert row["cpu_seconds"] > 0
    assert 0 <= row["unmasked"] < row["ci_masked"] + row["pgd_20"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(vpd_ground_truth, "run_seed", lambda *_, **__: pytest.fail("ran again"))
    (tmp_path / "rows.jsonl").open("a").write('{"cut')
    again = vpd_ground_truth.run(config, tmp_path, progress=False)
    assert again.iloc[0].to_dict() == row.to_dict()
    assert torch.get_num_threads() == threads


def test_ground_truth_scores_a_planted_answer_as_perfect() -> None:
    """Factors set to the truth, importances read off the inputs: errors 0, MMCS 1."""
    from mi_weightspace.vpd.host import ModuleHost
    from mi_weightspace.vpd.stream import SampledStream
    from mi_weightspace.vpd.train import train

    target = make_target("bilinear", "toy", 0)
    structure = bilinear.build(bilinear.PRESETS["bilinear"]["toy"], 0)
    settings = make_config(DECOMPOSITIONS["bilinear"]["toy"] | {"n_steps": 1, "warmup_steps": 1})
    host = ModuleHost(target.module, target.sites)
    trained = train(host, SampledStream(target.sample, 32, 0), settings, progress=False)
    used = structure.basis[:12]
    with torch.no_grad():
        for site in bilinear.SITES:
            for factor in (trained.factors.reads[site], trained.factors.writes[site]):
                factor.zero_()
            trained.factors.reads[site][:12] = structure.parts[site].read
            trained.factors.writes[site][:12] = structure.parts[site].write

    class Known(nn.Module):
        def forward(self, clean: Any, factors: Any) -> Tensor:
            z = -torch.ones(len(clean.batch), 24)
            z[:, :12] = torch.where((clean.batch @ used.T).abs() > 0.1, 2.0, -1.0)
            return z.repeat(1, 3)

    trained.objective.importance = Known()  # pyright: ignore[reportAttributeAccessIssue]
    row = vpd_ground_truth.score(target, trained, 0)
    assert row["ci_error_0.1"] == row["ci_error_0.2"] == 0
    assert row["mmcs"] == pytest.approx(1, abs=1e-5)
    assert row["alive/left"] == row["fires/left"] == 12
    assert row["l0_0.1/left"] == pytest.approx(1.2, rel=0.05)
    assert max(row["unmasked"], row["ci_masked"], row["pgd_20"]) < 1e-8
    assert row["found"], row["reason"]
    # everything important everywhere is no sparse answer
    trained.objective.importance = Everything()  # pyright: ignore[reportAttributeAccessIssue]
    row = vpd_ground_truth.score(target, trained, 0)
    assert not row["found"]
    assert "most of the rank" in row["reason"]
    # nothing important: the attack is free, and finds the all-zero mask
    trained.objective.importance = Nothing()  # pyright: ignore[reportAttributeAccessIssue]
    row = vpd_ground_truth.score(target, trained, 0)
    assert row["pgd_20"] > 0.97
    assert row["ci_masked"] == pytest.approx(1)
    assert not row["found"]


class Nothing(nn.Module):
    def forward(self, clean: Any, factors: Any) -> Tensor:
        return -torch.ones(len(clean.batch), 72)


class Everything(nn.Module):
    def forward(self, clean: Any, factors: Any) -> Tensor:
        return torch.ones(len(clean.batch), 72)
