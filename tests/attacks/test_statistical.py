"""Attacks that only harm: numbers of other people's code, values worked out by hand, and their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks.alie import largest_shift
from fedsim import distances, plugins
from fedsim.attack import AttackContext, CoordinationKnowledge, Knowledge
from fedsim.batch import Batch
from fedsim.config import load_config
from fedsim.direct import local_attack
from fedsim.errors import ConfigError, RunError
from fedsim.experiment import run

Reference = Callable[[str], dict[str, Any]]
Scene = Callable[..., dict[str, Any]]
MakeContext = Callable[..., AttackContext]

COLLUDING = ["alie", "ipm", "mimic", "min_max", "min_sum"]
ALL = [*COLLUDING, "gaussian_noise", "label_flip", "sign_flip"]


def coordinate(name: str, updates: Tensor, malicious: Tensor, **parameters: Any) -> Tensor:
    """What the server is given, the benign rows hidden as a run hides them."""
    attack = plugins.create("attack", name, **parameters)
    visible = Knowledge.BENIGN_UPDATES in attack.knowledge(attack.parameters)
    shown = updates if visible else torch.where(malicious[:, None], updates, torch.nan)
    kept = shown.clone()
    knowledge = CoordinationKnowledge(
        round=1,
        malicious=malicious,
        global_vector=torch.zeros_like(updates[0]),
        num_examples=torch.ones(len(updates), dtype=updates.dtype),
        generator=torch.Generator().manual_seed(0),
        benign_visible=visible,
    )
    made: Tensor = attack.coordinate(shown, knowledge)
    assert torch.equal(shown.nan_to_num(), kept.nan_to_num()), "the given matrix is left alone"
    assert made.dtype == updates.dtype
    return made


def sent(name: str, honest: Tensor, *, colluders: int = 2, **parameters: Any) -> Tensor:
    """(D,) what all colluders send beside the benign updates ``honest``; their own are far away."""
    updates = torch.cat([honest[:1], 1e3 + torch.arange(colluders)[:, None] + 0 * honest[:1], honest[1:]])
    malicious = torch.zeros(len(updates), dtype=torch.bool)
    malicious[1 : 1 + colluders] = True
    rows = coordinate(name, updates, malicious, **parameters)[malicious]
    assert bool((rows == rows[0]).all())
    return rows[0]


def sent_blind(name: str, honest: Tensor, **parameters: Any) -> Tensor:
    """(D,) what they send when ``honest`` are their own updates and those of the benign ones are hidden."""
    updates = torch.cat([honest[:2], torch.full_like(honest, 1e3), honest[2:]])
    malicious = torch.tensor([True] * 2 + [False] * len(honest) + [True] * (len(honest) - 2))
    return coordinate(name, updates, malicious, **parameters)[0]


def off(actual: Tensor, expected: Any) -> float:
    """The largest difference, relative to max(1, |expected|)."""
    want = torch.as_tensor(expected, dtype=torch.float64)
    return float(((actual - want).abs() / want.abs().clamp_min(1)).max())


@pytest.fixture(params=[0, 1])
def case(request: pytest.FixtureRequest, reference: Reference) -> dict[str, Any]:
    found: dict[str, Any] = reference("statistical_attacks")["cases"][request.param]
    found["rows"] = torch.tensor(found["vectors"], dtype=torch.float64)
    return found


# ------------------------------------------------------------------------------------------------- numbers


def test_z_of_alie(reference: Reference) -> None:
    whole = reference("statistical_attacks")
    for row in whole["z_table"]:
        assert largest_shift(row["n"], row["m"]) == pytest.approx(row["z"], abs=1e-12)
    assert len(whole["z_table"]) == 22
    for m, row in whole["ndss21_z_dictionary"].items():
        assert largest_shift(50, int(m)) == pytest.approx(row["true_z"], abs=1e-12)
        assert row["listed"] == pytest.approx(NormalDist().cdf(math.ceil(100 * row_p(50, int(m))) / 100), abs=2e-4)


def row_p(n: int, m: int) -> float:
    return (n - m - (n // 2 + 1 - m)) / (n - m)


def test_alie_numbers(case: dict[str, Any]) -> None:
    rows, expected = case["rows"], case["expected"]
    lasa = sent_blind("alie", rows, z=0.5, sign="minus", ddof=1)
    authors = sent_blind("alie", rows, z=1.5, sign="minus")
    byzfl = sent("alie", rows, z=1.5, ddof=1, sees="benign")
    ndss21 = sent("alie", rows, z=0.72575, ddof=1, sees="benign")
    blades = sent("alie", rows, ddof=1, sees="benign")
    assert off(lasa, expected["alie_lasa_mean_minus_0.5_std1"]) <= 1e-12
    assert off(authors, expected["alie_original_mean_minus_1.5_std0"]) <= 1e-12
    assert off(byzfl, expected["alie_byzfl_mean_plus_1.5_std1"]) <= 1e-12
    assert off(ndss21, expected["alie_ndss21_mean_plus_0.72575_std1"]) <= 1e-12
    assert expected["alie_blades_mean_plus_z_std1"]["n"] == len(rows) + 2
    assert off(blades, expected["alie_blades_mean_plus_z_std1"]["vector"]) <= 1e-12


def test_ipm_and_sign_flip_numbers(case: dict[str, Any], scene: Scene, make_context: MakeContext) -> None:
    rows, expected = case["rows"], case["expected"]
    for factor in (1.0, 2.0):
        assert off(sent("ipm", rows, factor=factor), expected[f"ipm_byzfl_tau_{factor}"]) <= 1e-12
    assert off(sent("ipm", rows), expected["ipm_blades_scale_1"]) <= 1e-12
    assert off(sent("sign_flip", rows, of="mean"), expected["sign_flip_byzfl_of_mean"]) <= 1e-12
    given, flip = scene("groupnorm"), plugins.create("attack", "sign_flip")
    context = make_context(given["model"], given["batches"])
    flipped = torch.stack([flip.craft(row, context) for row in rows])
    assert off(flipped, expected["sign_flip_lasa_each_own_update"]) == 0
    assert torch.equal(coordinate("sign_flip", flipped, torch.ones(len(rows), dtype=torch.bool)), flipped)
    assert off(plugins.create("attack", "sign_flip", factor=3.0).craft(rows[0], context), -3 * rows[0]) == 0


def direction(rows: Tensor, kind: str) -> Tensor:
    mean = rows.mean(0)
    return {"std": rows.std(0), "unit": mean / mean.norm(), "sign": mean.sign()}[kind]


def found_lambda(vector: Tensor, rows: Tensor, kind: str) -> float:
    p = direction(rows, kind)
    return float((rows.mean(0) - vector) @ p / (p @ p))


@pytest.mark.parametrize("origin", ["lasa", "ndss21"])
@pytest.mark.parametrize("kind", ["std", "unit", "sign"])
@pytest.mark.parametrize("name", ["min_max", "min_sum"])
def test_min_max_and_min_sum_numbers(case: dict[str, Any], name: str, kind: str, origin: str) -> None:
    rows = case["rows"]
    expected = case["expected"][f"{name}_{'unit_vec' if kind == 'unit' else kind}"][origin]
    options = {"deviation": kind, **({"row": "min"} if (name, origin) == ("min_sum", "ndss21") else {})}
    made = sent_blind(name, rows, sees="colluders", **options) if origin == "lasa" else sent(name, rows, **options)
    largest = float(direction(rows, kind).abs().max())
    assert (made - torch.tensor(expected["vector"])).abs().max() <= 2e-5 * largest
    assert found_lambda(made, rows, kind) == pytest.approx(expected["lambda_"], abs=2e-6)
    assert -1e-12 <= expected["exact_supremum_lambda"] - found_lambda(made, rows, kind) <= 2e-5


def test_min_max_numbers_of_blades(case: dict[str, Any]) -> None:
    expected = case["expected"]["min_max_blades_std"]
    made = sent("min_max", case["rows"], start=2.5, tolerance=0.005)
    assert found_lambda(made, case["rows"], "std") == pytest.approx(expected["lambda_"], abs=1e-12)
    assert off(made, expected["vector"]) <= 1e-12


# ------------------------------------------------------------------------------------------------- by hand


def exact_lambda(name: str, rows: Tensor, p: Tensor, row: str) -> float:
    """The positive root of each quadratic in λ; pairs by a loop."""
    mean, pairs = rows.mean(0), [[float((a - b).square().sum()) for b in rows] for a in rows]
    sums = [sum(line) for line in pairs]
    gaps = [mean - x for x in rows]
    near, along = [float(g @ g) for g in gaps], [float(g @ p) for g in gaps]
    if name == "min_max":
        bound, terms = max(map(max, pairs)), [(float(p @ p), b, a) for a, b in zip(near, along, strict=True)]
    else:
        bound = max(sums) if row == "max" else min(sums)
        terms = [(len(rows) * float(p @ p), sum(along), sum(near))]
    return min((b + math.sqrt(b * b - c * (a - bound))) / c for c, b, a in terms)


@pytest.mark.parametrize(("name", "row"), [("min_max", "max"), ("min_sum", "max"), ("min_sum", "min")])
@pytest.mark.parametrize("kind", ["std", "unit", "sign"])
def test_lambda_is_the_largest_that_fits(name: str, row: str, kind: str) -> None:
    draws = torch.Generator().manual_seed(0)
    for n, size in ((2, 3), (3, 1), (5, 40), (9, 7)):
        rows = torch.randn(n, size, generator=draws, dtype=torch.float64) + 0.2
        options = {"deviation": kind, **({"row": row} if name == "min_sum" else {})}
        made = sent(name, rows, start=500.0, tolerance=1e-7, **options)
        exact = exact_lambda(name, rows, direction(rows, kind), row)
        assert 1e-3 < exact < 1000
        assert -1e-9 * exact <= exact - found_lambda(made, rows, kind) <= 2e-7


def test_lambda_ends_below_twice_the_start_and_at_zero_where_nothing_fits() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    assert torch.allclose(sent("min_max", rows, deviation="unit"), rows[0], rtol=0, atol=1e-4)
    assert torch.equal(sent("min_max", rows), rows[0])
    wide = torch.tensor([[-1000.0, 1.0], [1000.0, 1.0]], dtype=torch.float64)
    assert 20 - 2e-5 <= found_lambda(sent("min_max", wide, deviation="unit"), wide, "unit") < 20
    assert 4 - 2e-5 <= found_lambda(sent("min_sum", wide, deviation="unit", start=2.0), wide, "unit") < 4


def test_alie_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0], [3.0, -2.0]], dtype=torch.float64)
    assert sent_blind("alie", rows, z=2.0).tolist() == [4.0, -2.0]
    assert sent_blind("alie", rows, z=2.0, sign="minus").tolist() == [0.0, -2.0]
    assert sent("alie", rows, z=1.0, ddof=1, sees="benign").tolist() == pytest.approx([2 + 2**0.5, -2.0])
    assert largest_shift(5, 2) == pytest.approx(NormalDist().inv_cdf(2 / 3))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (5, 3), (4, 3)])
def test_alie_says_where_the_paper_has_no_z(n: int, m: int) -> None:
    updates, malicious = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), torch.arange(n) < m
    with pytest.raises(RunError, match=f"no z for {m} colluders among {n} clients; set z"):
        coordinate("alie", updates, malicious)
    assert bool(torch.isfinite(coordinate("alie", updates, malicious, z=1.5)[malicious]).all())


def test_mimic_copies_the_furthest_along_the_direction_of_largest_variance() -> None:
    rows = torch.tensor([[0.0, 8.0], [-4.0, 8.0], [6.0, 8.0], [1.0, 8.0]], dtype=torch.float64)
    for i, turned in ((2, rows), (2, -rows), (2, rows.flip(1)), (1, rows - torch.tensor([8.0, 0.0]))):
        assert torch.equal(sent("mimic", turned), turned[i])
        centred = turned - turned.mean(0)
        z = torch.linalg.svd(centred).Vh[0]
        assert int((turned @ z).abs().argmax()) == i, "as the definition has it, through the singular vectors"
    assert torch.equal(sent("mimic", rows, choose="first"), rows[0])
    assert torch.equal(sent("mimic", rows[:1]), rows[0])
    assert torch.equal(sent("mimic", rows[:1].expand(3, 2).clone()), rows[0])


def test_gaussian_noise_is_noise_on_the_trainable_weights(scene: Scene, make_context: MakeContext) -> None:
    given = scene("batchnorm")
    update = torch.ones_like(make_context(given["model"], given["batches"]).global_vector)

    def noise(seed: int, **parameters: Any) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        context = make_context(given["model"], given["batches"], generator=draws)
        made = plugins.create("attack", "gaussian_noise", **parameters).craft(update, context)
        cut = context.model.layout.trainable
        assert 0 < cut < len(made)
        return made[:cut], made[cut:]

    weights, rest = noise(0)
    assert torch.equal(rest, torch.ones_like(rest))
    assert float(weights.mean()) == pytest.approx(0, abs=5 * 200 / len(weights) ** 0.5)
    assert float(weights.std()) == pytest.approx(200, rel=0.15)
    assert not torch.equal(weights, noise(1)[0])
    assert torch.allclose(noise(0, std=0.5)[0], weights / 400)
    assert torch.allclose(noise(0, std=0.5, add=True)[0], weights / 400 + 1)
    assert bool((update == 1).all())


def test_labels_are_flipped(scene: Scene, make_context: MakeContext) -> None:
    for kind, classes in (("groupnorm", 4), ("batchnorm", 4), ("sentiment", 2), ("sentiment_transformer", 2)):
        given = scene(kind)
        context = make_context(given["model"], given["batches"])
        context.model.module.train()
        before = {name: value.clone() for name, value in context.model.module.state_dict().items()}
        batch: Batch = given["batches"][0]
        flipped = plugins.create("attack", "label_flip").poison(batch, context)
        assert torch.equal(flipped.labels, classes - 1 - batch.labels)
        assert torch.equal(flipped.inputs, batch.inputs)
        assert context.model.module.training
        for name, value in context.model.module.state_dict().items():
            assert torch.equal(value, before[name]), name
    labels = torch.tensor([0, 1, 2, 3, 1])
    shown, context = Batch(torch.rand(5, 1, 8, 8).double(), labels), make_context(scene("groupnorm")["model"], [])

    def after(**parameters: Any) -> list[int]:
        made: Tensor = plugins.create("attack", "label_flip", **parameters).poison(shown, context).labels
        return made.tolist()

    assert after(classes=7) == [6, 5, 4, 3, 5]
    assert after(flip="pair") == [2, 1, 2, 3, 1]
    assert after(flip="pair", source=1, target=3) == [0, 3, 2, 3, 3]
    assert labels.tolist() == [0, 1, 2, 3, 1]
    for wrong in ({"source": 4}, {"target": 4}):
        with pytest.raises(RunError, match="is none of 4 classes"):
            after(flip="pair", **wrong)
    with pytest.raises(RunError, match="labels above classes − 1 = 2"):
        after(classes=3)


def test_label_flip_needs_scores_of_classes(make_context: MakeContext) -> None:
    shown = Batch(torch.rand(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    for model in (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), nn.Linear(3, 1)):
        context = make_context(model, [])
        with pytest.raises(RunError, match="set classes"):
            plugins.create("attack", "label_flip").poison(shown, context)
        made = plugins.create("attack", "label_flip", classes=2).poison(shown, context)
        assert made.labels.tolist() == [1, 0, 0, 1, 0]


def test_label_flip_onto_the_class_itself_is_refused() -> None:
    cls = plugins.get("attack", "label_flip")
    for options, paths in (
        ({}, []),
        ({"flip": "pair"}, []),
        ({"source": 2}, []),
        ({"flip": "pair", "source": 2}, ["target"]),
    ):
        assert [p.path for p in cls.problems(cls.Parameters(**options), SimpleNamespace())] == paths


# --------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("name", COLLUDING)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_small_rounds_have_a_result(name: str, n: int, m: int) -> None:
    updates = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    malicious = torch.arange(n) >= n - m
    cls = plugins.get("attack", name)
    fields = cls.Parameters.__dataclass_fields__
    for sees in ("benign", "colluders") if "sees" in fields else (None,):
        options: dict[str, Any] = {} if sees is None else {"sees": sees}
        made = coordinate(name, updates, malicious, **options, **({"z": 1.5} if name == "alie" else {}))[malicious]
        assert bool(torch.isfinite(made).all())
        seen = updates[~malicious] if m < n and sees != "colluders" else updates[malicious]
        if len(seen) == 1:  # no spread: the one update itself
            assert torch.allclose(made, (-seen if name == "ipm" else seen).expand_as(made), rtol=1e-12)


@pytest.mark.parametrize("name", COLLUDING)
def test_blocks_and_single_precision_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 23, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options: dict[str, Any] = {"z": 1.0, "sees": "benign"} if name == "alie" else {}
    whole = sent(name, rows, **options)
    single = sent(name, rows.float(), **options)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(distances, "BLOCK", 4)
    assert torch.allclose(sent(name, rows, **options), whole, rtol=1e-12, atol=1e-12)


def test_what_they_see() -> None:
    sees = {Knowledge.BENIGN_UPDATES, Knowledge.OWN_DATA}
    own = {Knowledge.OWN_DATA}
    for name, options, expected in (
        *((name, {}, sees) for name in ("ipm", "mimic", "min_max", "min_sum")),
        *((name, {"sees": "colluders"}, own) for name in ("min_max", "min_sum")),
        *((name, {}, own) for name in ("alie", "sign_flip", "gaussian_noise", "label_flip")),
        ("alie", {"sees": "benign"}, sees),
        ("sign_flip", {"of": "mean"}, sees),
    ):
        attack = plugins.create("attack", name, **options)
        assert attack.knowledge(attack.parameters) == expected, name
        assert not attack.backdoor


@pytest.mark.parametrize("name", ALL)
def test_they_train_without_the_trigger(name: str, scene: Scene) -> None:
    """On clean data exactly as an honest client trains; only what is sent differs."""
    given = scene("groupnorm")
    made = local_attack(name, **given, epochs=2).update
    assert torch.equal(made, local_attack(name, **{**given, "trigger": None}, epochs=2).update)
    honest = local_attack("data_poisoning", **{**given, "trigger": None}, epochs=2).update
    if name == "label_flip":
        flipped = [batch._replace(labels=3 - batch.labels) for batch in given["batches"]]
        honest = local_attack("data_poisoning", **{**given, "trigger": None, "batches": flipped}, epochs=2).update
    if name != "gaussian_noise":
        assert torch.equal(made, -honest if name == "sign_flip" else honest)


@pytest.mark.parametrize("values", [{"name": "ipm"}, {"name": "sign_flip", "of": "mean"}, {"name": "mimic"}])
def test_craft_steps_that_would_be_replaced_are_refused(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    tiny["attack"] = {**values, "schedule": {"name": "continuous"}, "trigger": {"name": "patch", "size": 3}}
    load_config(tiny)
    tiny["attack"]["craft"] = ["scale"]
    with pytest.raises(ConfigError, match=r"attack.craft: of no effect: .* write attack.craft: \[\]"):
        load_config(tiny)


@pytest.mark.parametrize("values", [{"name": "alie"}, {"name": "sign_flip"}, {"name": "min_max", "sees": "colluders"}])
def test_craft_steps_on_what_the_colluders_see_are_not(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    tiny["attack"] = {**values, "schedule": {"name": "continuous"}, "trigger": {"name": "patch", "size": 3}}
    tiny["attack"]["craft"] = ["scale"]
    assert load_config(tiny).attack is not None


def test_in_a_run_the_colluder_sends_what_a_benign_client_sends(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["attack"] = {"name": "mimic", "schedule": {"name": "continuous", "start": 3, "stop": 4}}
    tiny["attack"]["trigger"] = {"name": "patch", "size": 3}
    run(load_config(tiny), out=tmp_path / "run")
    clients = pd.read_parquet(tmp_path / "run" / "clients.parquet")
    attacked = clients[clients["round"].isin(clients[clients["malicious"]]["round"])]
    assert attacked["round"].nunique() == 2
    for _, played in attacked.groupby("round"):
        copied = played[played["malicious"]]["update_norm"]
        assert set(copied) <= set(played[~played["malicious"]]["update_norm"])
