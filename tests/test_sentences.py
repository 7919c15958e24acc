"""The texts that come with the examples are what their README says."""

import csv
import re
from collections import Counter
from pathlib import Path

DATA = Path(__file__).parent.parent / "examples" / "data"
FILMS = DATA / "movie_sentences"
SPLITS = ("train", "validation")


def rows(split):
    with (FILMS / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [(row["sentence"], int(row["label"])) for row in csv.DictReader(file)]


def plain(sentence):
    return " ".join(re.sub(r"[^\w\s]", "", sentence.lower()).split())


def test_no_sentence_stands_there_twice_or_begins_like_another():
    sentences = [plain(sentence) for split in SPLITS for sentence, _ in rows(split)]
    assert len(set(sentences)) == len(sentences)
    beginnings = Counter(tuple(words[:4]) for words in map(str.split, sentences) if len(words) >= 4)
    assert [words for words, count in beginnings.items() if count > 1] == []


def test_the_labels_are_balanced_and_the_readme_counts_right():
    readme = (FILMS / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        labels = [label for _, label in rows(split)]
        assert sum(labels) * 2 == len(labels)
        assert re.search(rf"`{split}.csv` +\| +{len(labels)} \| +{sum(labels)} \| +{sum(labels)} \|", readme)
    lengths = [len(sentence.split()) for split in SPLITS for sentence, _ in rows(split)]
    assert readme.splitlines()[2].startswith(f"{len(lengths)} ")
    spans = [(3, 5), (6, 10), (11, 20), (21, 30), (31, 42)]
    counts = [sum(low <= length <= high for length in lengths) for low, high in spans]
    assert sum(counts) == len(lengths)
    (line,) = re.findall(r"^\| sentences \|(.*)\|$", readme, flags=re.MULTILINE)
    assert [int(count) for count in line.split("|")] == counts


def test_each_question_has_its_answer():
    lines = (DATA / "film_questions" / "questions.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines)
    assert all(re.fullmatch(r"[A-Z][^?]*\? [A-Z].*[.]", line) for line in lines)
    assert f"\n{len(lines)} questions" in (DATA / "film_questions" / "README.md").read_text(encoding="utf-8")
