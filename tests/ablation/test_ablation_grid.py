"""The presets and the grids: that every method can be made, and what it is compared with."""

import json
from dataclasses import asdict

import pytest

from helpers.tiny import tdkern_
from tdkern.ablation.grid import RIVALS, Setting, preset_of, setting_of
from tdkern.ablation.presets import PRESETS, SIZES
from tdkern.ablation.problems import PROBLEMS
from tdkern.ablation.tables import Table, settings_of, table_of

PAPER = ("main", "weights", "lambda", "stride", "steps", "overhead")


def test_the_papers_tables_are_presets_and_every_problem_has_a_size():
    assert {f"paper-{name}" for name in PAPER} | {"evidence"} == {*PRESETS}
    assert {*SIZES} == {*PROBLEMS}


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_of_a_preset_can_be_made(name):
    preset = PRESETS[name]
    keys = {}
    for problem in ("mixture", "patches8"):
        for method, each in preset.methods.items():
            setting = setting_of(each, problem, SIZES[problem])
            loss = setting.make_loss()
            assert all(
                getattr(loss, option) is not None or value is None
                for option, value in setting.loss.items()
            )
            assert {*preset.against(method)} <= {*preset.methods} - {method}
            # what a file holds of it is the same setting
            assert Setting(**json.loads(json.dumps(asdict(setting)))).key == setting.key
            assert keys.setdefault(setting.key, method) == method
    assert preset.baseline == "EDM" and not preset.methods["EDM"].td
    assert all(preset.against(method) for method in preset.methods if method != "EDM")


def test_the_evidence_has_every_rival_alone_and_beside_td():
    methods = PRESETS["evidence"].methods
    for rival in RIVALS:
        td = {method.td for method in methods.values() if method.rival == rival}
        assert td == {True, False}
    larger = [name for name, method in methods.items() if method.batch_factor > 1]
    assert {methods[name].td for name in larger} == {True, False}
    beside = [name for name, each in methods.items() if each.td and (each.rival or name in larger)]
    for name in beside:  # against EDM, and against the rival without TD
        baseline, rival = methods[name].against
        assert baseline == "EDM" and not methods[rival].td
        assert methods[rival].rival == methods[name].rival
        assert methods[rival].batch_factor == methods[name].batch_factor


def test_settings_of_the_same_meaning_are_one_job():
    """The defaults are a part of a setting, also where nothing was said of them."""
    keys = {
        setting_of(PRESETS[preset].methods[method], "mixture", SIZES["mixture"]).key
        for preset, method in (
            ("paper-main", "TD"),
            ("paper-weights", "TD, pairwise weight"),
            ("paper-lambda", "TD, lambda 0.5"),
            ("paper-stride", "TD, delta 1/4"),
        )
    }
    assert len(keys) == 1


def test_a_share_of_the_window_is_what_the_loss_says():
    windowed = PRESETS["evidence"].methods["TD, online, window"]
    setting = setting_of(windowed, "mixture", SIZES["mixture"])
    loss = setting.make_loss()
    assert loss.td_share == pytest.approx(loss.window_share(setting.batch), abs=1e-4) != 1.0


def test_at_equal_compute_what_costs_more_has_fewer_steps():
    preset, size = PRESETS["paper-main"], SIZES["mixture"]
    steps = settings_of(preset, "mixture", size, "steps", {})
    costs = {steps["TD"].step_key: {"of_baseline": 1.6}}
    compute = settings_of(preset, "mixture", size, "compute", costs)
    assert compute["EDM"] == steps["EDM"] and [*compute] == ["EDM", "TD"]
    assert compute["TD"].steps == size.steps / 1.6
    # a row's key is the same with any number of steps where a step's cost is meant
    assert compute["TD"].step_key == steps["TD"].step_key != compute["TD"].key
    table = table_of("t", preset, "compute", compute, [0, 1], False)
    assert Table.of_line(json.loads(json.dumps(table.line()))) == table


def test_a_grid_is_every_combination_against_the_same_without_td():
    grid = preset_of({"weight": ["pairwise", "online"], "precision": ["fp32", "bf16"]})
    assert {name: method.td for name, method in grid.methods.items()} == {
        "edm, precision fp32": False,
        "edm, precision bf16": False,
        **{
            f"edm with TD, weight {weight}, precision {precision}": True
            for weight in ("pairwise", "online")
            for precision in ("fp32", "bf16")
        },
    }
    name = "edm with TD, weight online, precision bf16"
    assert grid.methods[name].loss == {"weight": "online"}
    assert grid.against(name) == ("edm, precision bf16",)
    assert grid.against("edm, precision bf16") == ("edm, precision fp32",)


@pytest.mark.parametrize(
    "words, code, message",
    [
        ("", 2, "give either --preset or --vary"),
        ("--preset paper-main --vary weight=online", 2, "give either --preset or --vary"),
        ("--vary weight", 2, "must be NAME=VALUE"),
        ("--vary wait=online", 2, "must be NAME=VALUE"),
        ("--vary steps=two", 2, "steps takes whole numbers, or none"),
        ("--vary td_sigma=1:x", 2, "td_sigma takes numbers parted by colons, or none"),
        ("--vary weight=heavy", 1, "edm with TD, weight heavy: td_coef: weight must be one of"),
        ("--vary k=3", 1, "--vary k: edm has no such option"),
        ("--vary rival=nobody", 1, "rival must be stable-target or power-average, got 'nobody'"),
        ("--vary family=flow --vary td_sigma=0.3:5", 1, "--vary td_sigma: flow has no such option"),
        ("--preset paper-main --method EDM2", 1, "--method must be of EDM, TD, TD, published"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, words, code, message):
    out = tmp_path / "results.jsonl"
    output = tdkern_("ablate", *words.split(), "--problem", "mixture", "--out", out, code=code)
    assert message in output
    assert not out.exists() or out.read_bytes() == b""
