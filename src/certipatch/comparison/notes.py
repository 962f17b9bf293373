"""Sentences beside the tables of a comparison."""

from collections.abc import Callable

from certipatch.comparison.pairs import Comparison, Pair
from certipatch.comparison.runs import Run
from certipatch.comparison.tables import p_value, points

METHOD = (
    "Differences are in percentage points, over the pictures that both runs evaluated, with Tango's 95 % score interval "
    "for paired proportions (Statistics in Medicine 17, 1998); p is McNemar's exact two-sided test. "
    "Intervals of single accuracies are Wilson's, 95 %."
)
NARROW = "\u202f"  # a space without a line break


def verdict(comparison: Comparison, pair: Pair) -> str:
    """The difference of a pair's certified accuracies, in one sentence."""
    a, b = (f"{comparison.letters[i]} ({comparison.runs[i].name})" for i in (pair.first, pair.second))
    one = pair.certified
    if one is None:
        causes = {"notion": "one certifies recovery, the other detection", "threat": "their threats differ"}
        cause = causes.get(pair.incomparable or "", "they share no picture")
        return f"{b} and {a} are not compared in certified accuracy: {cause}."
    low, high = one.ci95
    p = f"p {'' if one.p_value < 0.001 else '= '}{p_value(one)}".replace(" ", NARROW)
    size, interval = points(one)[:-1].split(" (", 1)
    numbers = f"(95{NARROW}% interval {interval}, {p}), on the same {pair.n:,} pictures"
    if low <= 0 <= high:
        return f"Between {b} and {a} there is no clear difference in certified accuracy: {size} points {numbers}."
    return f"{b} certifies {size.lstrip('+−')} points {'more' if low > 0 else 'fewer'} than {a} {numbers}."


def sentences(comparison: Comparison) -> list[str]:
    """The method, the notes, and the agreement of certificates, as whole sentences."""
    texts = [METHOD, *notes(comparison)]
    if counts := comparison.agreement():
        alone = [key for key in counts if key.startswith("only ")]
        letters = ", ".join(key.removeprefix("only ") for key in alone)
        texts.append(
            f"of {counts['pictures']:,} pictures, {letters} all certify {counts['all']:,}, none of them "
            f"{counts['none']:,}; " + ", ".join(f"{key} {counts[key]:,}" for key in alone)
        )
    return [text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".") for text in texts]


def notes(comparison: Comparison) -> list[str]:
    """Facts that limit the comparison, beginning with the pairs that are not subtracted."""
    runs = comparison.runs

    def letters(has: Callable[[Run], bool]) -> str:
        *others, last = [letter for letter, run in comparison.named_runs() if has(run)]
        return f"{', '.join(others)} and {last}" if others else last

    notions = {run.notion for run in runs}
    explained = notions <= {"recovery", "detection"}  # by the note on detection
    texts = [p.reason for p in comparison.pairs if p.reason and not (explained and p.incomparable == "notion")]
    if "detection" in notions:
        texts.append(
            f"{letters(lambda run: run.notion == 'detection')}: certified by detection: an attack leaves the answer right "
            "or raises an alarm. That is less than recovery (the answer stays right), and is not subtracted from it. "
            "An alarm on a clean picture counts as wrong"
        )
    for confidence in dict.fromkeys(run.confidence for run in runs if run.confidence < 1):
        names = letters(lambda run, confidence=confidence: run.confidence == confidence)
        texts.append(
            f"{names}: certificates rest on samples; each may be wrong with a chance of up to {1 - confidence:.2g}"
        )
    for pair in comparison.pairs:
        larger = max(runs[pair.first].n, runs[pair.second].n)
        if 0 < pair.n < larger:
            names = f"{comparison.letters[pair.first]} and {comparison.letters[pair.second]}"
            texts.append(f"{names} are paired on the {pair.n:,} pictures that both evaluated, of up to {larger:,}")
    for remark in dict.fromkeys(run.note for run in runs if run.note):
        names = letters(lambda run, remark=remark: run.note == remark)
        texts.append(f"about the data of {names}: {remark}")
    if any(run.milliseconds is None for run in runs):
        texts.append(f"{letters(lambda run: run.milliseconds is None)}: no time was measured (no timing.json)")
    if devices := dict.fromkeys(run.device for run in runs if run.device):
        warning = "; times of different devices do not compare" if len(devices) > 1 else ""
        texts.append("times: measured by each run when it ran, on " + " and ".join(devices) + warning)
    if len(comparison.pairs) > 1:
        texts.append(f"{len(comparison.pairs)} pairs are compared; neither intervals nor p are adjusted for that")
    return texts
