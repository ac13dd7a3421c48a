"""How the numbers of a summary are put into words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.recording.portable import portable

ABSENT = "—"
"""Stands where a number is unknown or meaningless."""

_MOST_CLASSES = 20  # a table of more is not read
_NARROW = "\u202f"  # narrow no-break space: a number and its unit stay on one line


@dataclass(frozen=True)
class Verdict:
    """The answer of a run. headline: a short sentence. detail: how it was measured, one or two sentences."""

    headline: str
    detail: str


@dataclass(frozen=True)
class Row:
    """One measure of a table. values: as many as the table has columns. definition: one line."""

    name: str
    values: tuple[str, ...]
    definition: str


@dataclass(frozen=True)
class Section:
    """A table of measures. columns: the column heads; a section with a single column has no heads.

    prefix: what a row's name needs before it where the title is not shown.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    prefix: str = ""


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: 0.1234 → 12.3 %."""
    return ABSENT if share is None else f"{100 * share:.{digits}f}{_NARROW}%"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, signed: −0.012 → −1.2 pp."""
    if difference is None:
        return ABSENT
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return f"{'0.0' if text in ('+0.0', '−0.0') else text}{_NARROW}pp"


def number(value: float | None) -> str:
    """A plain number with up to three significant decimals."""
    return ABSENT if value is None else f"{value:.3g}".replace("-", "−")


def perplexity(value: float | None) -> str:
    """A perplexity: 88.1, or 2.0e+06 where the model knows next to nothing."""
    return ABSENT if value is None else f"{value:.1f}" if value < 1e5 else f"{value:.1e}"


def span(value: Mapping[str, Any] | None) -> str:
    """A number of rounds; ``> 12`` if the run ended before it was over."""
    if value is None:
        return ABSENT
    return f">{_NARROW}{value['rounds']}" if value["censored"] else str(value["rounds"])


def rounds(count: int) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count} round{'' if count == 1 else 's'}"


def seconds(value: float) -> str:
    """A duration in the unit that reads best: 8.2 ms, 0.31 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value < 0.1:
        return f"{1000 * value:.2g}{_NARROW}ms"
    if value < 10:
        return f"{value:.2g}{_NARROW}s"
    if round(value) < 60:
        return f"{value:.0f}{_NARROW}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{_NARROW}min {rest:02d}{_NARROW}s"
    return f"{minutes // 60}{_NARROW}h {minutes % 60:02d}{_NARROW}min"


def threshold(summary: Mapping[str, Any]) -> str:
    """The κ of the headline, as the summary spells it: 0.5 where it is among them, else the middle one."""
    keys = sorted(summary["lifespan"], key=float)
    return "0.5" if "0.5" in keys else keys[len(keys) // 2]


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """The sentence a reader came for: how long the backdoor lived."""
    key = threshold(summary)
    kappa, t0 = percent(float(key), 0), summary["t0"]
    if t0 is None:
        return Verdict("Nobody attacked", "No malicious client submitted an update in this run.")
    life = summary["lifespan"][key]
    where = f"the last malicious update (round {t0})"
    if life is None:
        return Verdict("Persistence was not measured", f"No round was evaluated since {where}.")
    if summary["time_to_inject"][key] is None:
        return Verdict(
            "The backdoor never took hold",
            f"Its success rate was never above κ = {kappa} in an evaluated round, from the first malicious "
            f"update to the end of the run.",
        )
    if summary["final"]["round"] == t0:
        state = "alive" if life["censored"] else "dead"
        return Verdict(
            "The attack lasted until the run ended",
            f"Round {t0}, the last one, still had a malicious update, so what comes after is unknown. "
            f"The backdoor was then {state} at κ = {kappa}.",
        )
    if life["rounds"] == 0 and not life["censored"]:
        return Verdict(
            "The backdoor did not outlive the attack",
            f"Its success rate was never above κ = {kappa} in an evaluated round after {where}.",
        )
    if life["censored"]:
        return Verdict(
            f"The backdoor lived more than {rounds(life['rounds'])}",
            f"It was still above κ = {kappa} when the run ended, {rounds(life['rounds'])} after {where}: a "
            f"lower bound, not a lifespan.",
        )
    first = summary["lifespan"][key]["first_crossing"]
    detail = f"That is how long after {where} its success rate was last above κ = {kappa}."
    if not first["censored"] and first["rounds"] <= life["rounds"]:
        detail += f" It first fell to κ or below at age {first['rounds']} and came back."
    return Verdict(f"The backdoor lived {rounds(life['rounds'])}", detail)


@dataclass(frozen=True)
class Counted:
    """What is counted, in words. asr, accuracy: the share of what; empty where nothing needs saying. of: both."""

    asr: str = ""
    accuracy: str = ""
    of: str = "test examples"


def counted(config: Mapping[str, Any]) -> Counted:
    """How the task of a config counts the attack success rate and the main accuracy."""
    task = named(config.get("task"))
    if task == "next_word":
        attack = config.get("attack")
        trigger = attack.get("trigger") if isinstance(attack, Mapping) else None
        exact = isinstance(trigger, Mapping) and trigger.get("success") == "exact"
        which = "the very target word meant for them" if exact else "a target word"
        return Counted(
            f"share of held-out prompts that the model completes with {which}",
            "share of held-out words that are the model’s first guess (top-1); a word that is not in the "
            "vocabulary counts as missed",
            "test prompts and words",
        )
    if task == "sentiment":
        return Counted("share of held-out triggered texts, none of them of the target class, that the model maps to it")
    return Counted()


def named(value: Any) -> str:
    """The name of a choice of a config: ``krum`` of ``{name: krum, f: 2}``; of a list, the names joined."""
    if isinstance(value, Mapping):
        return str(value.get("name", ""))
    return " + ".join(named(item) for item in value) if isinstance(value, list) else str(value or "")


def baseline(data: Mapping[str, Any]) -> str:
    """What always giving the commonest answer would get, from a manifest's ``data``; empty where unknown."""
    for key in ("commonest_word", "commonest_class"):
        answer, share = data.get(key), data.get(f"{key}_accuracy")
        if answer is not None and isinstance(share, (int, float)):
            said = f"class {answer}" if isinstance(answer, int) else answer
            return f"For comparison: always saying “{said}” would get a main accuracy of {percent(share)}."
    return ""


def class_section(
    accuracies: Sequence[float | None] | None, names: Sequence[Any] = (), target: int | None = None
) -> Section | None:
    """The main accuracy per class; None where it is not counted, or of more classes than a table can show.

    names: of the classes; numbers where there are none. target: the class the backdoor maps to.
    """
    if not accuracies or len(accuracies) > _MOST_CLASSES:
        return None
    known = len(names) == len(accuracies)
    rows = tuple(
        Row(str(names[i]) if known else str(i), (percent(share),), "target of the backdoor" if i == target else "")
        for i, share in enumerate(accuracies)
    )
    return Section("Accuracy per class", ("",), rows)


def persistence_sections(summary: Mapping[str, Any], says: Counted = Counted()) -> tuple[Section, ...]:
    """The persistence numbers as tables: by threshold κ, by age H, and the rest. says: what the task counts."""
    kappas = sorted(summary["lifespan"], key=float)
    horizons = sorted(summary["area"], key=int)
    lives = [summary["lifespan"][key] for key in kappas]
    by_kappa = (
        Row(
            "lifespan",
            tuple(span(life) for life in lives),
            "largest age s, in rounds, at which ASR was above κ; “> s”: alive when the run ended",
        ),
        Row(
            "first fall",
            tuple(ABSENT if life is None else span(life["first_crossing"]) for life in lives),
            "first age s at which ASR was κ or below; it may rise again",
        ),
        Row(
            "submissions to inject",
            tuple(_count(summary["time_to_inject"][key]) for key in kappas),
            "malicious updates sent until ASR was above κ first",
        ),
    )
    by_age = (
        Row(
            "ASR at age H",
            tuple(percent(summary["asr_at"][key]) for key in horizons),
            "attack success rate H rounds after the last malicious update",
        ),
        Row(
            "mean ASR to age H",
            tuple(percent(summary["area"][key]) for key in horizons),
            "area under the curve: mean over the evaluated ages 1 to H",
        ),
    )
    floor, final = summary["floor"], summary["final"]
    rest = [
        Row(
            "half-life",
            (span(summary["half_life"]),),
            f"first age, in rounds, at which the excess of ASR over its floor had halved (floor: {floor})",
        ),
        Row("final ASR", (percent(final["asr"]),), _at_the_end(says.asr)),
        Row("final main accuracy", (percent(final["main_accuracy"]),), _at_the_end(says.accuracy)),
    ]
    if final.get("perplexity") is not None:
        rest.append(
            Row(
                "final perplexity",
                (perplexity(final["perplexity"]),),
                "e to the mean loss per held-out word: as unsure as among so many equally likely words; low is good",
            )
        )
    return (
        Section("By threshold κ", tuple(percent(float(key), 0) for key in kappas), by_kappa),
        Section("By age H, in rounds", tuple(horizons), by_age),
        Section("In one number", ("",), tuple(rest)),
    )


def _at_the_end(meaning: str) -> str:
    return f"{meaning}; at the last evaluated round" if meaning else "at the last evaluated round"


def stealth_sections(summary: Mapping[str, Any]) -> tuple[Section, ...]:
    """What the attack cost the main task and what the defense saw of it."""
    detection, stealth = summary["detection"], summary["stealth"]
    found = (
        Row("TPR", (percent(detection["tpr"]),), "malicious updates that were not accepted"),
        Row("FPR", (percent(detection["fpr"]),), "benign updates that were not accepted, all rounds"),
        Row(
            "FPR under attack",
            (percent(detection["fpr_attack_rounds"]),),
            "benign updates that were not accepted, in rounds with a malicious one",
        ),
        Row(
            "malicious weight",
            (percent(detection["malicious_weight"]),),
            "share of malicious updates in the aggregate, mean over attack rounds",
        ),
    )
    sections = [Section("Detection", ("",), found)]
    if detection["auroc"]:
        definition = "chance that a malicious client scores above a benign one in an attack round"
        scored = tuple(
            Row(name, (number(value),), definition if i == 0 else "")
            for i, (name, value) in enumerate(detection["auroc"].items())
        )
        sections.append(Section("AUROC by score", ("",), scored, "AUROC "))
    if stealth is not None:
        hidden = (
            Row(
                "over attack rounds",
                (points(stealth["attack_rounds"]),),
                "mean; negative: the attack costs accuracy",
            ),
            Row("at t₀", (points(stealth["at_t0"]),), "after the last malicious update"),
            Row("at the end", (points(stealth["final"]),), "at the last evaluated round"),
        )
        sections.append(Section("Main accuracy minus the clean twin’s", ("",), hidden, "Δ accuracy "))
    return tuple(sections)


_LONG = 24  # so many items of a list are shown


def plain(value: Any) -> str:
    """A value of a manifest in one line; long lists and mappings are cut."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return _cut([f"{portable(str(key))}: {plain(item)}" for key, item in value.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _cut([plain(item) for item in value])
    return portable(str(value)) or ABSENT


def _cut(items: list[str]) -> str:
    shown = ", ".join(items[:_LONG])
    return f"{shown}, … ({len(items)} in all)" if len(items) > _LONG else shown or ABSENT


def _count(value: int | None) -> str:
    return ABSENT if value is None else str(value)


def clock(seconds: float | None) -> str:
    """A duration as 1:02:03, 2:03, or ? where it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
