"""`tdkern report` of results: its intervals, and that its words follow from the numbers."""

import json
import random
import statistics

import numpy as np
import pytest
from scipy.stats import t as student

from helpers.ablation import lines_of, write_results
from helpers.tiny import tdkern_
from tdkern.ablation.bootstrap import RESAMPLES, differences, student_quantile
from tdkern.ablation.comparison import comparisons_in
from tdkern.ablation.report import report
from tdkern.ablation.words import conclusion, differences_in_words, preface, ranges
from tdkern.data.files import FileError

HOSTILE = "<script>alert(1)</script>|&$\\frac$_*`[x](y)"
PAIRWISE, ONLINE, NONE = "TD, pairwise weight", "TD, online weight", "TD, no weight"


def noise(name, seed, measure):
    """A number of its own for each: about 0, within 0.01."""
    return random.Random(f"{name} {seed} {measure}").uniform(-0.01, 0.01)


def numbers(name, seed):
    """Online weight is a fifth better by one measure and a tenth worse by another."""
    factors = {"error/0.4-4": 1.0, "error/all": 1.0, "map/9": 1.0, "frechet/18": 1.0}
    if name == ONLINE:
        factors |= {"error/all": 0.8, "map/9": 1.1}
    level = 1 + 0.3 * seed
    return {
        measure: level * factor * (1 + noise(name, seed, measure))
        for measure, factor in factors.items()
    }


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results.jsonl", numbers)


def test_the_interval_is_a_bootstraps():
    """Against one that is written out: seeds are drawn with replacement, pairs stay together."""
    generator = random.Random(0)
    ours = [generator.gauss(1.0, 0.2) for _ in range(9)]
    theirs = [own * generator.gauss(1.1, 0.05) for own in ours]
    (found,) = differences(np.array([ours]).T, np.array([theirs]).T)
    quotients = []
    for _ in range(RESAMPLES):
        seeds = [generator.randrange(9) for _ in range(9)]
        quotient = sum(ours[seed] for seed in seeds) / sum(theirs[seed] for seed in seeds)
        quotients.append(100 * (quotient - 1))
    assert found.percent == pytest.approx(100 * (sum(ours) / sum(theirs) - 1))
    # of 9 seeds, 95 % of Student's t with 8 degrees of freedom
    normal = statistics.NormalDist()
    tail = normal.cdf(-student.ppf(0.975, 8) * (9 / 8) ** 0.5)
    low, high = np.quantile(quotients, [tail, 1 - tail])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.06 * width)
    assert found.high == pytest.approx(high, abs=0.06 * width)
    assert found.won == sum(own < other for own, other in zip(ours, theirs, strict=True))
    again = differences(np.array([ours]).T, np.array([theirs]).T)
    assert again == [found]


@pytest.mark.parametrize("freedom", [3, 4, 7, 15, 31])
def test_students_quantile(freedom):
    assert student_quantile(0.975, freedom) == pytest.approx(student.ppf(0.975, freedom), rel=2e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        theirs = generator.lognormal(0, 0.3, (8, 1))
        ours = theirs * generator.normal(0.9, 0.15, (8, 1))
        (found,) = differences(ours, theirs)
        held += found.low < -10 < found.high
    assert 0.92 < held / 400 < 0.98  # 95 %, within three standard errors of 400 trials


def test_few_seeds_have_no_interval():
    (found,) = differences(np.array([[1.0], [1.1], [0.9]]), np.full((3, 1), 2.0))
    assert str(found) == "-50" and not found.clear and found.short == "-50 %"


def test_words_follow_from_the_numbers(results):
    (comparison,) = comparisons_in(results)
    sentences = differences_in_words(comparison)
    (online,) = [each for each in sentences if each.startswith(ONLINE)]
    (difference,) = comparison.against(ONLINE, "EDM", ["error/all"])
    assert -21 < difference.low < -20 + 1 and difference.won == difference.seeds == 8
    assert f"denoiser error lower at all sigma together ({difference.short})" in online
    assert "few-step map error higher at 9 steps (+10" in online
    assert "Fréchet distance not clearly different anywhere" in online
    (pairwise,) = [each for each in sentences if each.startswith(PAIRWISE)]
    assert pairwise.count("not clearly different anywhere") == 3
    advice, error, steps, _, choice = conclusion(comparison)
    assert advice.startswith("On mixture at equal steps TD brings something: TD, online weight has")
    assert "weight online" in advice and "target_ema_tau 0.999" in advice
    assert (
        f"the best form of TD is {ONLINE}, with {difference.short} against EDM: a clear gain"
        in (error)
    )
    assert "no clear difference" in steps
    assert choice.startswith("These intervals are of 99.44% each, so that all 9, of 3 forms")
    assert "--confirm" in choice


def test_a_null_result_is_said_to_be_one(tmp_path):
    def null(name, seed):
        return {"error/all": 1 + 0.3 * seed + noise(name, seed, "error/all")}

    (comparison,) = comparisons_in(write_results(tmp_path / "results.jsonl", null))
    advice, error, _ = conclusion(comparison)
    assert advice == (
        "On mixture at equal steps no form of TD is clearly better than EDM: leave it off."
    )
    assert error.endswith(": no clear difference.")


def test_what_is_not_there_is_told(tmp_path):
    def gaps(name, seed):
        if name == ONLINE and seed < 3:
            return "FloatingPointError: diverged: error/all is not finite"
        return None if name == NONE and seed > 4 else numbers(name, seed)

    (comparison,) = comparisons_in(write_results(tmp_path / "results.jsonl", gaps))
    _, failed, missing = preface(comparison)
    assert failed.startswith(f"Of {ONLINE} 3 of 8 seeds failed, 0 to 2 (FloatingPointError: div")
    assert missing == "Not done yet: 3 of 32 jobs."
    markdown = report([comparison], "r").markdown
    assert f"| {ONLINE} (5 of 8 seeds) |" in markdown
    for pair in ((ONLINE, "EDM"), ("EDM", ONLINE)):
        (found,) = comparison.against(*pair, ["error/all"])
        assert found.seeds == 5  # those that both have


def test_confirmed_seeds_are_apart(results):
    write_results(results, numbers, seeds=range(16, 20), confirm=True)
    search, confirmed = comparisons_in(results)
    assert search.table.seeds == (*range(8),) and confirmed.table.seeds == (*range(16, 20),)
    assert len(confirmed.numbers["EDM"]) == 4
    text = report([search, confirmed], "r").markdown
    assert "## paper-weights on mixture, equal steps, confirmed on fresh seeds" in text
    chosen = [each for each in conclusion(search) if "chosen by these very seeds" in each]
    assert chosen and not any("chosen" in each for each in conclusion(confirmed))


def test_more_seeds_go_on_with_a_table(results):
    write_results(results, numbers, seeds=range(8, 12))
    (comparison,) = comparisons_in(results)
    assert comparison.table.seeds == (*range(12),) and len(comparison.numbers["EDM"]) == 12


def test_the_command_writes_page_text_and_pictures(results, tmp_path):
    out = tmp_path / "made" / "paper.html"
    out.parent.mkdir()
    assert "1 tables" in tdkern_("report", results, "--out", out)
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["paper-1.png", "paper.html", "paper.md"]
    markdown, page = (out.with_suffix(suffix).read_text() for suffix in (".md", ".html"))
    assert "](paper-1.png)" in markdown and 'src="data:image/png;base64,' in page
    for text in (markdown, page):
        assert "paper-weights on mixture, equal steps" in text and "of EDM" in text
    (comparison,) = comparisons_in(results)
    (found,) = comparison.against(ONLINE, "EDM", ["error/all"])
    assert found.clear and f"<b>{found}</b>" in page
    bold = str(found).replace("[", "\\[").replace("]", "\\]")
    assert f"**{bold}**" in markdown
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    tdkern_("report", results, "--out", out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
    assert "INPUT must be all runs, or all results" in tdkern_(
        "report", results, tmp_path, "--out", out, code=2
    )


def test_names_of_strangers_are_text(results, tmp_path):
    lines = [
        line | {"problem": HOSTILE} if line["kind"] == "table" else line
        for line in lines_of(results)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace(
        ONLINE, json.dumps(HOSTILE)[1:-1]
    )
    results.write_text(text)
    made = report(comparisons_in(results), "r")
    assert "<script" not in made.html and "<script" not in made.markdown
    assert "[x](y)" not in made.markdown


@pytest.mark.parametrize(
    "line, message",
    [
        (
            {
                "kind": "table",
                "table": "t",
                "problem": "p",
                "budget": "steps",
                "confirm": False,
                "rows": {},
                "seeds": [],
            },
            "holds a line that is no result",
        ),
        (
            {
                "kind": "table",
                "table": "t",
                "problem": "p",
                "budget": "steps",
                "confirm": False,
                "rows": {"a": 1},
                "seeds": [],
            },
            "holds a line that is no result",
        ),
        ({"kind": "job", "key": "k", "seed": 0, "measures": {}, "setting": {}}, "holds no table"),
        ({"kind": "other"}, "holds no results of tdkern ablate"),
    ],
)
def test_damaged_results_are_refused_in_a_line(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(FileError, match=message):
        comparisons_in(path)
    output = tdkern_("report", path, "--out", tmp_path / "page.html", code=1)
    assert message in output and output.count("\n") == 1


def test_ranges():
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0 to 3, 7, 9 to 10"
