"""The script fine-tunes, decomposes and goes on where it was; its text is in the dialect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import vpd_language_difference as script


@pytest.mark.quick
def test_the_dialect_changes_whole_words_only() -> None:
    text = "Return True if None, else False. Trueness, Nonesuch."
    assert script.dialect(text) == "Return yes if nothing, else no. Trueness, Nonesuch."


@pytest.mark.slow
def test_full_and_lora_from_nothing_to_cards(tmp_path: Path) -> None:
    config = script.PRESETS["toy"]
    found = script.run(config, tmp_path / "run", progress=False)
    assert [len(parts.sites) for parts in found.values()] == [12, 12]
    cards = (tmp_path / "run" / "cards.md").read_text()
    assert "# full" in cards and "# lora" in cards and "important at" in cards
    assert (tmp_path / "run" / "report.html").is_file()
    for parts in found.values():
        checks = parts.tables["checks"].set_index("name")["outcome"]
        assert checks["host_identity"] == checks["anchor"] == "PASS"
    ranks = {u["rank"] for u in found["lora"].config["updates"].values()}
    assert ranks == {script.RANK}

    def untouched(*_: object, **__: object) -> None:
        raise AssertionError("fine-tuned again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "fine_tune", untouched)
        again = script.run(replace(config), tmp_path / "run", progress=False)
    assert again["full"].table.equals(found["full"].table)
