import json
import time

import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.train import metrics


def steps(workdir):
    return [row["step"] for row in metrics.read_rows(workdir / "metrics.jsonl")]


def write(workdir, *numbers, first_step=0):
    writer = metrics.MetricsWriter(workdir, first_step=first_step)
    for number in numbers:
        writer.write(number, {"loss": number / 2, "epoch": 0})
    writer.close()


def test_rows_and_events(tmp_path):
    write(tmp_path / "new", 1, 2)
    assert metrics.read_rows(tmp_path / "new" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "epoch": 0},
        {"step": 2, "loss": 1.0, "epoch": 0},
    ]
    assert [p.name.startswith("events.out.tfevents") for p in (tmp_path / "new").iterdir()].count(True) == 1


def test_rows_are_there_while_the_writer_is_open(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, {"loss": float("nan")})
    assert steps(tmp_path) == [1]
    writer.close()
    writer.close()
    writer.write(2, {"loss": 1.0})
    assert steps(tmp_path) == [1]


def test_resuming_drops_what_will_be_written_again(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    write(tmp_path, 3, 4, 5, first_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    write(tmp_path, 6, first_step=5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    write(tmp_path, 1)
    assert steps(tmp_path) == [1]


def test_a_last_line_cut_short_is_dropped(tmp_path):
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, 3, first_step=2)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "5", "[]", '{"loss": 1}', '{"step": "1"}', ""])
def test_other_damage_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is not a row of metrics") as error:
        metrics.read_rows(path)
    assert "\n" not in str(error.value)


def test_no_rows_where_there_is_no_file(tmp_path):
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == []


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    metrics.write_json(path, {"mAP": 0.5})
    metrics.write_json(path, {"mAP": 0.75})
    assert json.loads(path.read_text()) == {"mAP": 0.75}
    with pytest.raises(TypeError):
        metrics.write_json(path, {"mAP": object()})
    assert json.loads(path.read_text()) == {"mAP": 0.75}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    for name in ("results.json.0123.part", "metrics.jsonl.4567.part"):
        (tmp_path / name).write_text("{")
    write(tmp_path, 1)
    assert not list(tmp_path.glob("*.part"))


def test_the_bar_reaches_its_total(capsys):
    with metrics.progress_bar(10, label="query", initial=4) as bar:
        bar.update(6)
    assert "query: 100%" in capsys.readouterr().err


def test_a_stage_that_is_soon_over_has_no_bar(capsys):
    with metrics.progress_bar(2, label="ranking", unit="queries", delay=60.0) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_pause_is_not_in_the_rate(monkeypatch):
    now = [time.time()]
    with metrics.progress_bar(100, label="train") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        # A compilation of an hour, and then ten images a minute.
        now[0] += 3600.0
        bar.skip_pause()
        for _ in range(3):
            now[0] += 60.0
            bar.update(10)
        assert bar.format_dict["rate"] == pytest.approx(1 / 6)


def test_lines_come_though_epochs_are_shorter_than_the_time_between_them(monkeypatch):
    now, printed = [time.time()], []
    monkeypatch.setattr(metrics.Bar, "refresh", lambda bar, *args, **options: printed.append(bar.n))
    with metrics.progress_bar(1000, label="train") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        for _ in range(10):
            # Ten seconds of clustering, and then ten of steps.
            now[0] += 10.0
            bar.skip_pause()
            for _ in range(5):
                now[0] += 2.0
                bar.update(4)
        assert printed == [0, 60, 120, 180]
        assert bar.format_dict["rate"] == pytest.approx(2)
