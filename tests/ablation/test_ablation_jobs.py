"""Jobs in processes: several at a time, through failures and kills, and over restarts."""

import json
import os
import signal
import time

import pytest

from helpers.ablation import (
    die,
    die_once,
    error_of,
    fail,
    lines_of,
    quick_costs,
    quick_train,
    square,
    times,
    train_but_without_weight,
    with_doubles,
)
from helpers.tiny import ended, started, tdkern_
from tdkern.ablation import ablate
from tdkern.ablation.grid import Setting
from tdkern.ablation.jobs import Job, run_jobs
from tdkern.ablation.results import opened
from tdkern.data.files import FileError

COMMAND = ["ablate", "--preset", "paper-weights", "--problem", "mixture", "--jobs", 2]


@pytest.fixture
def quick(monkeypatch):
    """The command's jobs are quick; what is returned changes what trains."""
    monkeypatch.setattr(ablate, "train", quick_train)
    monkeypatch.setattr(ablate, "measure_costs", quick_costs)
    return lambda train: monkeypatch.setattr(ablate, "train", train)


def run(jobs, workers=2):
    """The results of jobs and the errors, each by the job's name."""
    done, failed = {}, {}

    def keep(where):
        return lambda job, value: where.update({job.name: value})

    run_jobs(jobs, workers, keep(done), keep(failed))
    return done, failed


def test_a_job_that_fails_or_is_killed_harms_no_other(tmp_path):
    jobs = [Job(f"square {x}", square, (x,)) for x in range(3)]
    jobs[1:1] = [Job("fails", fail, ()), Job("dies", die, ())]
    jobs.append(Job("dies once", die_once, (str(tmp_path / "mark"),)))
    done, failed = run(jobs)
    assert done == {"square 0": 0, "square 1": 1, "square 2": 4, "dies once": "done"}
    assert failed == {
        "fails": "ValueError: a job\\nthat cannot be done",
        "dies": "its process ended with exit code -9",
    }


def test_two_at_a_time():
    done, failed = run([Job(str(i), times, ()) for i in range(4)])
    assert not failed and len({pid for pid, *_ in done.values()}) == 2
    changes = [(began, 1) for _, began, _ in done.values()]
    changes += [(ended, -1) for *_, ended in done.values()]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    assert most == 2


def test_a_killed_call_goes_on_where_it_was(tmp_path):
    """Killed in the middle, the same call does what is missing, and nothing twice."""
    out, log = tmp_path / "results.jsonl", tmp_path / "log"
    command = [*COMMAND, "--seeds", "0-7", "--out", out]
    process = started(command, log, with_doubles)
    until = time.monotonic() + 60
    while not (out.exists() and out.read_text().count('"kind": "job"') >= 5):
        assert process.is_alive() and time.monotonic() < until, log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = [line for line in lines_of(out) if line["kind"] == "job"]
    assert 5 <= len(before) < 32
    with open(out, "a") as file:
        file.write('{"kind": "job", "key": "torn')  # as a kill may leave it
    code, text = ended(command, log, with_doubles)
    assert code == 0 and "holds no result" in text, text
    lines = [json.loads(line) for line in out.read_text().splitlines() if "torn" not in line]
    kinds = [line["kind"] for line in lines]
    assert (kinds.count("cost"), kinds.count("table")) == (1, 1)
    jobs = [line for line in lines if line["kind"] == "job"]
    assert jobs[: len(before)] == before
    assert len(jobs) == len({(line["key"], line["seed"]) for line in jobs}) == 32
    for line in jobs:
        setting = Setting(**line["setting"])
        assert setting.key == line["key"]
        assert line["measures"]["error/all"] == error_of(setting, line["seed"])


def test_a_broken_method_is_reported_and_the_others_go_on(tmp_path, quick):
    words = [*COMMAND, "--seeds", "0-1", "--out", tmp_path / "results.jsonl"]
    quick(train_but_without_weight)
    output = tdkern_(*words, code=1)
    assert output.count("Failed: TD, no weight on mixture, equal steps, seed ") == 2
    assert "2 failed; the others are in" in output
    kinds = [line["kind"] for line in lines_of(words[-1])]
    assert (kinds.count("job"), kinds.count("failed")) == (6, 2)
    quick(quick_train)  # mended, the same call does what failed, and nothing else
    tdkern_(*words)
    assert [line["kind"] for line in lines_of(words[-1])[len(kinds) :]] == ["job", "job"]


def test_equal_compute_is_as_many_steps_as_the_baselines_take_time(tmp_path, quick):
    words = [*COMMAND, "--seeds", "0", "--steps", 100, "--out", tmp_path / "results.jsonl"]
    tdkern_(*words, "--budget", "steps", "--budget", "compute")
    jobs = [line["setting"] for line in lines_of(words[-1]) if line["kind"] == "job"]
    # the baseline is one job of both tables
    assert sorted((job["td"], job["steps"]) for job in jobs) == (
        [(False, 100)] + [(True, 50)] * 3 + [(True, 100)] * 3
    )


def test_one_writer(tmp_path):
    path = tmp_path / "results.jsonl"
    with opened(path) as results:
        results.append({"kind": "failed", "key": "a", "seed": 0, "error": "b"})
        with pytest.raises(FileError, match="another process writes results here"):
            with opened(path):
                pass
    with opened(path) as results:
        assert [line["key"] for line in results.lines] == ["a"]


def test_another_file_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not results\n")
    output = tdkern_(*COMMAND, "--out", path, code=1)
    assert "holds no results of tdkern ablate" in output and output.count("\n") == 1
    assert path.read_text() == "not results\n"


def test_seeds_that_chose_do_not_confirm(tmp_path, quick):
    words = [*COMMAND, "--out", tmp_path / "results.jsonl"]
    tdkern_(*words, "--seeds", "0-1")
    message = "--seeds must be others with --confirm than without: 1 of paper-weights on mixture"
    assert message in tdkern_(*words, "--seeds", "1-2", "--confirm", code=1)
    tdkern_(*words, "--seeds", "2-3", "--confirm", "--method", "TD, online weight")
    assert message.replace(" 1 of", " 2 of") in tdkern_(*words, "--seeds", "2", code=1)
    *_, table = [line for line in lines_of(words[-1]) if line["kind"] == "table"]
    assert table["confirm"] and [*table["rows"]] == ["EDM", "TD, online weight"]
