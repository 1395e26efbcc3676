"""What a comparison's numbers say, in sentences that are made of them alone."""

from collections.abc import Iterable

from ..data.files import first_of
from ..demo.tables import verdict
from .bootstrap import CONFIDENCE, LEAST, Difference
from .comparison import Comparison

# of the measures before a slash: what they are, and where they are taken
GROUPS = {
    "error": ("denoiser error", "sigma {}"),
    "map": ("few-step map error", "{} steps"),
    "frechet": ("Fréchet distance", "{} steps"),
}
BUDGETS = {"steps": "equal steps", "compute": "equal compute"}


def groups_of(measures: Iterable[str]) -> dict[str, list[str]]:
    """Measures by what stands before their slash, in their order."""
    groups: dict[str, list[str]] = {}
    for name in measures:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def title_of(group: str) -> str:
    """What a group of measures is."""
    return GROUPS.get(group, (group, ""))[0]


def place_of(measure: str) -> str:
    """Where a measure is taken, such as "sigma 0.4-4"."""
    group, _, place = measure.partition("/")
    if place == "all":
        return "all sigma together"
    return GROUPS.get(group, ("", "{}"))[1].format(place)


def heading(comparison: Comparison) -> str:
    """A table's name, its problem and its budget."""
    table = comparison.table
    fresh = ", confirmed on fresh seeds" if table.confirm else ""
    return f"{table.name} on {table.problem}, {BUDGETS.get(table.budget, table.budget)}{fresh}"


def preface(comparison: Comparison) -> list[str]:
    """How it was trained, and what is not there."""
    table = comparison.table
    baseline = table.rows[table.baseline].setting
    sentences = [
        f"{table.baseline} is trained for {baseline.get('steps')} steps of batch "
        f"{baseline.get('batch')}, and the others for "
        + ("as many." if table.budget == "steps" else "what takes as long.")
    ]
    if not table.seeds:
        return ["Steps were measured, and nothing was trained."]
    sentences.append(
        f"{len(table.seeds)} seeds, {ranges(table.seeds)}; all methods share a seed's initial "
        "weights, data and noise. Less is better everywhere."
    )
    return [" ".join(sentences), *_gaps(comparison)]


def _gaps(comparison: Comparison) -> list[str]:
    """What failed, and what is not done yet."""
    table, sentences, missing = comparison.table, [], 0
    for name in table.rows:
        done, failed = comparison.numbers[name], comparison.failed[name]
        missing += len({*table.seeds} - {*done} - {*failed})
        if failed:
            why = next(iter(failed.values()))
            sentences.append(
                f"Of {name} {len(failed)} of {len(table.seeds)} seeds failed, {ranges(failed)} "
                f"({why}): they are in no mean, and in no difference."
            )
    if missing:
        sentences.append(f"Not done yet: {missing} of {len(table.seeds) * len(table.rows)} jobs.")
    return sentences


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in words: "0 to 7, 16"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(low) if low == high else f"{low} to {high}" for low, high in runs]
    return first_of(words)


def differences_in_words(comparison: Comparison) -> list[str]:
    """A sentence for each pair of rows that are compared."""
    sentences = []
    groups = groups_of(comparison.measures)
    for name, other in comparison.pairs():
        clauses = []
        for group, measures in groups.items():
            found = comparison.against(name, other, measures)
            clauses.append(f"{title_of(group)} {verdict(found, [*map(place_of, measures)])}")
        sentences.append(f"{name} against {other}: {'; '.join(clauses)}.")
    return sentences


def caution(comparison: Comparison) -> str:
    """How many intervals there are, and what that means."""
    pairs = len(list(comparison.pairs()))
    intervals = pairs * len(comparison.measures)
    if len(comparison.table.seeds) < LEAST:
        return f"Of fewer than {LEAST} seeds there are no intervals, and no difference is clear."
    return (
        f"Intervals hold the difference with a probability of {CONFIDENCE:.0%} each, over seeds; "
        f"a difference is called clear where its interval leaves out 0. Of {intervals} intervals "
        f"about {(1 - CONFIDENCE) * intervals:.0f} would do so by chance alone."
    )


def conclusion(comparison: Comparison) -> list[str]:
    """What follows for a user: of the forms of TD the best by each kind of measure, against the
    baseline, and its settings.

    The best of several is good by chance too, so its interval has a confidence at which all that
    it was chosen among hold together (Bonferroni).
    """
    table, rows = comparison.table, comparison.table.rows
    forms = [name for name in rows if _is_form_of_td(comparison, name)]
    if not forms:
        return []
    groups = groups_of(comparison.measures)
    tests = len(forms) * len(groups)
    confidence = 1 - (1 - CONFIDENCE) / tests
    sentences, winners = [], {}
    for group, measures in groups.items():
        last = measures[-1]
        best = min(forms, key=lambda name: comparison.means(name, [last])[0])
        (found,) = comparison.against(best, table.baseline, [last], confidence)
        sentences.append(
            f"By {title_of(group)}, {place_of(last)}, the best form of TD is {best}, with "
            f"{found.short} against {table.baseline}: {_result(found)}."
        )
        if found.clear and found.percent < 0:
            winners[best] = rows[best].setting
    where = f"On {table.problem} at {BUDGETS.get(table.budget, table.budget)}"
    advice = f"{where} no form of TD is clearly better than {table.baseline}: leave it off."
    if winners:
        settings = "; ".join(f"{name} has {_settings(each)}" for name, each in winners.items())
        advice = f"{where} TD brings something: {settings}."
    return [advice, *sentences, *_of_the_choice(comparison, len(forms), tests, confidence)]


def _result(found: Difference) -> str:
    if not found.clear:
        return "no clear difference"
    return "a clear gain" if found.percent < 0 else "a clear loss"


def _is_form_of_td(comparison: Comparison, name: str) -> bool:
    """Whether a row is TD alone, with nothing else beside it, and is compared with the baseline."""
    table = comparison.table
    row, baseline = table.rows[name], table.rows[table.baseline].setting
    alike = all(
        row.setting.get(each) == baseline.get(each) for each in ("batch", "rival", "family")
    )
    compared = (name, table.baseline) in comparison.pairs()
    return bool(row.setting.get("td")) and alike and compared


def _settings(setting: dict) -> str:
    """The settings of a loss and of its target, in words."""
    loss = setting.get("loss")
    loss = loss if isinstance(loss, dict) else {}
    words = [f"{name} {value}" for name, value in loss.items()]
    return ", ".join([*words, f"target_ema_tau {setting.get('target_ema_tau')}"])


def _of_the_choice(comparison: Comparison, forms: int, tests: int, confidence: float) -> list[str]:
    """How the best was chosen, and how sure that leaves us."""
    sentence = (
        f"These intervals are of {confidence:.2%} each, so that all {tests}, of {forms} forms by "
        f"each kind of measure, hold with {CONFIDENCE:.0%}."
    )
    if not comparison.table.confirm and forms > 1:
        sentence += (
            " The best was chosen by these very seeds, so that its own numbers are too hopeful; "
            "tdkern ablate --confirm with fresh --seeds tells what remains."
        )
    return [sentence]
