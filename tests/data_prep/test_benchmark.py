import pytest

from data_prep import benchmark


@pytest.mark.parametrize("flags", [[], ["--folder=f", "--images=0"], ["--wat=1"], ["--folder=f", "more"]])
def test_wrong_commands_are_told(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["benchmark", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_crops_are_different_and_laid_out_as_luperson(tmp_path):
    size = benchmark.write_crops(tmp_path, 250)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert len({path.read_bytes() for path in files}) == len(files) == 250
    assert size == sum(path.stat().st_size for path in files)
    assert {len(path.relative_to(tmp_path).parts) for path in files} == {4}
