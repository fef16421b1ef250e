"""The table of verdict words, from the code that gives them."""

from __future__ import annotations

from mi_weightspace.core.verdict import Word
from mi_weightspace.page.answer import FOUND, MEANING

DOES_NOT: dict[Word, str] = {
    Word.WRITTEN_HERE: "that the model uses it, or that the behaviour depends on this matrix alone",
    Word.READ_HERE: "that reading it has an effect",
    Word.STAGE_DISTRIBUTED: "that every matrix took part",
    Word.ALIGNED: "that this stage is special: innocent later stages get the word too",
    Word.ALIGNED_NOT_SPECIFIC: "that nothing was written; the stage moved much else as well",
    Word.ALIGNED_NO_CONTROLS: "that the match is more than the loud coordinates of the stream",
    Word.ALIGNED_NUISANCE: "that the behaviour is absent",
    Word.NO_CHANGE: "anything about parameters that were not compared",
    Word.BELOW_FLOOR: "that training changed nothing: what it changed was lost in rounding",
    Word.NOT_SIGNIFICANT: "that nothing is there",
    Word.UNRESOLVED: "that there is no direction; a subspace may still be resolved",
    Word.UNDERPOWERED: "that the answer is no",
    Word.AXIS_SPECIFIC: "that training caused the shift, or that the model uses it",
    Word.NOT_AXIS_SPECIFIC: "that the behaviour is not represented",
    Word.LOAD_BEARING: "that nothing else carries the behaviour",
    Word.NECESSARY_ONLY: "that the direction alone brings the behaviour about",
    Word.DETECTOR_ONLY: "that the probe is bad: it reads something the model does not use there",
    Word.GENERIC: "that the direction belongs to this behaviour",
    Word.NOT_LOAD_BEARING: "that the information is absent",
    Word.UNCONVERGED: "anything about structure: the numbers may still move",
    Word.NOT_DECOMPOSABLE: "that other methods fail there too",
    Word.INSTRUMENT_TOO_WEAK: "that the hidden stage is clean",
    Word.PROMPT_OR_FINETUNING: "that there is no misalignment",
    Word.NOT_DETECTED: "that the stage is clean",
    Word.NORM_NOT_DEFEATED: "that an SAE was needed",
    Word.SAE_ADDS_NOTHING: "that the SAE reads nothing",
    Word.SAE_UNRESOLVED: "that the SAE is better, or that it is not",
    Word.NON_LINEAR_CODE: "that the SAE found the code: it is one readout among several",
    Word.SAE_ADVANTAGE: "that the latents are what the model computes with",
}
"""What a word does not claim, in words that finish the sentence."""


def table() -> str:
    """One row a word: what it says, what it does not say."""
    assert set(DOES_NOT) == set(Word) == set(MEANING), "a word without its row"
    rows = ["| word | it says | it does not say |", "|---|---|---|"]
    for word in Word:
        shown = f"**`{word}`**" if word in FOUND else f"`{word}`"
        rows.append(f"| {shown} | {MEANING[word]} | {DOES_NOT[word]} |")
    return "\n".join(rows)
