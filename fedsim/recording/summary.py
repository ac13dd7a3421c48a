"""One run's numbers: persistence, stealth and detection, from the tables a run leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedsim import persistence
from fedsim.persistence import Curve, Span

KAPPAS = (0.25, 0.5, 0.75)
"""The thresholds κ above which a backdoor counts as alive."""

HORIZONS = (10, 50, 100, 250, 500, 1000)
"""The ages H, in rounds, at which ASR is reported and up to which it is averaged."""

SUBMITTED = ("ok", "rejected")
"""Client states in which an update reached the server; a rejected one never got as far as the defense."""


def summarise(
    rounds: pd.DataFrame,
    clients: pd.DataFrame,
    *,
    twin: pd.DataFrame | None = None,
    kappas: Sequence[float] = KAPPAS,
    horizons: Sequence[int] = HORIZONS,
) -> dict[str, Any]:
    """Everything a run says about its backdoor, ready for JSON (what is unknown or meaningless is None).

    Parameters
    ----------
    rounds: one row a round: ``round`` from 1, ``main_accuracy``, ``main_loss``, ``asr`` (NaN where not
        evaluated), ``malicious_submitted``; where the task counts them ``perplexity`` and ``class_accuracy``.
    clients: one row a client and round: ``round``, ``malicious``, ``accepted``, ``weight``, ``status``,
        ``scores`` (pairs of name and value; larger is more suspicious).
    twin: the ``rounds`` table of the clean twin, the floor of the ASR; None: the floor is taken as 0.
    kappas: thresholds in [0, 1]. horizons: ages in rounds, ≥ 1.

    Returns
    -------
    dict with the keys

    t0: the last round with a malicious submission, or None.
    lifespan: κ → {rounds, censored, first_crossing: {rounds, censored}} or None.
    half_life: {rounds, censored} or None. floor: ``"clean twin"`` or ``"assumed 0"``.
    area, asr_at: H → share in [0, 1] or None. time_to_inject: κ → submissions or None.
    final: round, main_accuracy, main_loss, perplexity, class_accuracy (list by true class), asr of the last
        evaluated round.
    stealth: main accuracy minus the twin's: mean over attack_rounds, at_t0, final; None without a twin.
    detection: auroc (score → [0, 1] or None), tpr, fpr, fpr_attack_rounds, malicious_weight.
    """
    rounds = rounds.sort_values("round")
    curve = _curve(rounds)
    floor = None if twin is None else _curve(twin.sort_values("round"))
    submitted = dict(zip(rounds["round"].tolist(), rounds["malicious_submitted"].tolist(), strict=True))
    t0 = persistence.last_submission(submitted)
    known = t0 is not None
    since = t0 if t0 is not None else 0  # never looked at where nothing is known
    return {
        "t0": t0,
        "lifespan": {f"{k:g}": _life(curve, since, k) if known else None for k in kappas},
        "half_life": _span(persistence.half_life(curve, since, floor)) if known else None,
        "area": {str(h): persistence.area(curve, since, h) if known else None for h in horizons},
        "asr_at": {str(h): persistence.asr_at(curve, since, h) if known else None for h in horizons},
        "time_to_inject": {f"{k:g}": persistence.time_to_inject(curve, submitted, k) for k in kappas},
        "final": _final(rounds),
        "stealth": None if twin is None else _stealth(rounds, twin, t0),
        "detection": _detection(clients),
        "floor": "assumed 0" if twin is None else "clean twin",
    }


def score_table(clients: pd.DataFrame) -> pd.DataFrame:
    """The defense's scores, one column a name (sorted), on the index of ``clients``; NaN where there is none.

    Accepts what Parquet maps become in pandas (lists of pairs) as well as dicts.
    """
    rows = [dict(scores) if isinstance(scores, (list, dict, np.ndarray)) else {} for scores in clients["scores"]]
    names = sorted({name for row in rows for name in row})
    columns = {name: [_number(row.get(name)) for row in rows] for name in names}
    return pd.DataFrame(columns, index=clients.index, dtype="float64")


def under_attack(clients: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of a ``clients`` table are of rounds with a malicious client in it."""
    return clients["round"].isin(clients.loc[clients["malicious"].astype(bool), "round"].unique())


def auroc(scores: pd.Series[float], malicious: pd.Series[bool]) -> float | None:
    """The area under the ROC curve of ``scores`` (n,), larger meaning more suspicious; NaN is dropped.

    The chance that a random malicious client scores above a random benign one, ties counting half. None if
    one of the two classes is missing.
    """
    from sklearn.metrics import roc_auc_score  # a second of import that only a finished run pays

    kept = scores.notna()
    truth = malicious[kept].astype(bool)
    if truth.nunique() < 2:
        return None
    return float(roc_auc_score(truth, scores[kept].rank()))  # ranks, since a score may be infinite


def _curve(rounds: pd.DataFrame) -> Curve:
    asr = rounds["asr"].to_numpy(dtype=np.float64, na_value=np.nan)
    return Curve.of(rounds["round"].to_numpy(dtype=np.int64), asr)


def _span(span: Span | None) -> dict[str, Any] | None:
    return None if span is None else {"rounds": span.rounds, "censored": span.censored}


def _life(curve: Curve, t0: int, kappa: float) -> dict[str, Any] | None:
    life = _span(persistence.lifespan(curve, t0, kappa))
    if life is None:
        return None
    return {**life, "first_crossing": _span(persistence.first_crossing(curve, t0, kappa))}


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _or_none(value: Any) -> float | None:
    return None if pd.isna(value) or not np.isfinite(float(value)) else float(value)


def _final(rounds: pd.DataFrame) -> dict[str, Any]:
    evaluated = rounds[rounds["main_accuracy"].notna() | rounds["asr"].notna()]
    found: dict[Any, Any] = {} if evaluated.empty else evaluated.iloc[-1].to_dict()
    by_class = found.get("class_accuracy")  # runs of older versions have no such column
    return {
        "round": int(found["round"]) if found else None,
        "main_accuracy": _or_none(found.get("main_accuracy")),
        "main_loss": _or_none(found.get("main_loss")),
        "perplexity": _or_none(found.get("perplexity")),
        "class_accuracy": list(map(_or_none, by_class)) if isinstance(by_class, (list, tuple, np.ndarray)) else None,
        "asr": _or_none(found.get("asr")),
    }


def _stealth(rounds: pd.DataFrame, twin: pd.DataFrame, t0: int | None) -> dict[str, float | None]:
    accuracy = rounds.set_index("round")["main_accuracy"].astype("float64")
    difference = (accuracy - twin.set_index("round")["main_accuracy"].astype("float64")).dropna()
    attacks = rounds.loc[rounds["malicious_submitted"] > 0, "round"]
    return {
        "attack_rounds": _or_none(difference[difference.index.isin(attacks)].mean()),
        "at_t0": _or_none(difference.get(t0)) if t0 in difference.index else None,
        "final": _or_none(difference.iloc[-1]) if len(difference) else None,
    }


def _detection(clients: pd.DataFrame) -> dict[str, Any]:
    sent = clients[clients["status"].isin(SUBMITTED)]
    malicious = sent["malicious"].astype(bool)
    turned_away = ~(sent["accepted"].astype(bool) & (sent["status"] == "ok"))
    attacked = under_attack(sent)
    scores = score_table(sent[attacked])
    weight = sent["weight"].astype("float64")[malicious].groupby(sent["round"]).sum()
    return {
        "auroc": {str(name): auroc(scores[name], malicious[attacked]) for name in scores},
        "tpr": _or_none(turned_away[malicious].mean()),
        "fpr": _or_none(turned_away[~malicious].mean()),
        "fpr_attack_rounds": _or_none(turned_away[~malicious & attacked].mean()),
        "malicious_weight": _or_none(weight.mean()),
    }
