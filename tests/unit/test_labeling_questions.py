"""Generated questions: the prompt, reading what an LLM wrote, and which questions are kept."""

import math
from collections import Counter

import numpy as np
import pytest

from llmr_ray.labeling.questions import (
    answer_reason,
    answer_segments,
    counted,
    form_reason,
    generation_segments,
    is_answered,
    read_questions,
    reject_reasons,
)


def text_of(segments):
    return "".join(segment.text for segment in segments)


def test_the_prompt_is_one_form_repeated():
    """Prevents a small model from having to guess where a question begins; the passage comes last."""
    segments = generation_segments(" Dune is a novel. ", [("Emma is a novel.", "Who wrote Emma?")])
    assert text_of(segments).endswith(
        "\n\nPassage: Emma is a novel.\nQuestion: Who wrote Emma?\n\nPassage: Dune is a novel.\nQuestion:"
    )
    assert text_of(segments).startswith("Write 2 factual questions that can be answered using only the passage.")
    assert "Write 3 factual" in text_of(generation_segments("x", [], number=3))
    answer = text_of(answer_segments("Dune is a novel.", "What is Dune?"))
    assert answer.endswith("Question: What is Dune?\nAnswer:")


def test_demonstrations_are_cut_before_the_passage():
    """Prevents a long prompt from losing what it asks about, or a question."""
    shown = [("first passage", "First question?"), ("second passage", "Second question?")]
    segments = generation_segments("the passage", shown, passage_tokens=9, demonstration_tokens=4)
    cut = [
        (part.text, part.max_tokens) for part in sorted(segments, key=lambda part: part.trim_order) if part.trim_order
    ]
    assert cut == [("first passage", 4), ("second passage", 4), ("the passage", 9)]
    [passage] = [part for part in answer_segments("the passage", "Which?", passage_tokens=9) if part.trim_order]
    assert (passage.text, passage.max_tokens) == ("the passage", 9)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" Who wrote Dune?\nWhen was it written?\nWhere?", ["Who wrote Dune?", "When was it written?"]),
        ("1. Who wrote Dune?\n\n2) When was it?\n", ["Who wrote Dune?", "When was it?"]),
        ("- Who?\n* Where?", ["Who?", "Where?"]),
        (" Who wrote Dune?\nQuestion: When?\nPassage: Emma\nQuestion: Who?", ["Who wrote Dune?", "When?"]),
        ("Question 1: Who wrote Dune?\nQ2. When?", ["Who wrote Dune?", "When?"]),
        (" Who?\n\nPassage: Other\nQuestion: Not of this passage?", ["Who?"]),
        ("1984 was written by whom?", ["1984 was written by whom?"]),
        ("3.5 million people live in which city?", ["3.5 million people live in which city?"]),
        ("1. 1984: which year is it?\n2) 12: who?", ["1984: which year is it?", "12: who?"]),
        ("-40 degrees are how much?\n(3) Who?", ["-40 degrees are how much?", "Who?"]),
        ("100. Who was it?\n2. Question 2: Where?", ["100. Who was it?", "Where?"]),
        ("", []),
        ("\n \n", []),
    ],
)
def test_reading_questions(output, expected):
    """Prevents numbers, labels and what the model goes on to invent from becoming questions."""
    assert read_questions(output) == expected


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("Who wrote the novel Dune?", None),
        ("Who wrote the novel Dune", "no_question_mark"),
        ("Dune is a novel.", "no_question_mark"),
        ("Who wrote Dune?", "too_short"),
        ("Who wrote it then?", None),
        ("Who " + "very " * 38 + "much?", None),
        ("Who " + "very " * 39 + "much?", "too_long"),
        ("What does this passage say about Dune?", "needs_passage"),
        ("What does the author think of it?", "needs_passage"),
        ("According to the text, who won it?", "needs_passage"),
        ("Who is the author of the novel Dune?", None),
        ("What preceded the passage of the Act?", None),
        ("Who is mentioned in the above paragraph?", "needs_passage"),
        ("Which coauthors wrote the textbook on it?", None),
    ],
)
def test_forms(question, reason):
    """Prevents questions that nobody can understand without the passage, and good ones from being lost to a word."""
    assert form_reason(question) == reason


def grams(text):
    """Counts of character 3- to 5-grams within words, padded by one space."""
    found = Counter()
    for word in text.split():
        padded = f" {word} "
        for size in (3, 4, 5):
            if len(padded) <= size:
                found[padded] += 1
                break
            found.update(padded[n : n + size] for n in range(len(padded) - size + 1))
    return found


def gram_cosine(a, b):
    squares = (sum(number * number for number in counts.values()) for counts in (a, b))
    return sum(number * b[gram] for gram, number in a.items() if gram in b) / math.sqrt(math.prod(squares))


def test_near_texts_against_a_naive_walk():
    """Prevents near duplicates across blocks, and a chain of duplicates from removing what nothing kept repeats."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    bases = [" ".join(rng.choice(words, 9)) for _ in range(40)]
    questions = []
    for _ in range(310):
        text = bases[rng.integers(40)].split()
        for _ in range(rng.integers(0, 3)):
            text[rng.integers(9)] = str(rng.choice(words))
        questions.append(" ".join(text) + "?")
    existing, questions = questions[:30], questions[30:]
    kept, expected = {text.rstrip("?"): grams(text.rstrip("?")) for text in existing}, []
    for question in questions:
        text = question.rstrip("?")
        is_near = any(gram_cosine(grams(text), other) > 0.9 for other in kept.values())
        expected.append("same_text" if text in kept else "near_text" if is_near else None)
        if expected[-1] is None:
            kept[text] = grams(text)
    found = reject_reasons(questions, existing)
    assert {"same_text", "near_text", None} <= set(expected)
    # The first copy of a text that was itself near another one still makes the second the same text.
    assert [reason is None for reason in found] == [reason is None for reason in expected]
    assert counted(found).total() == sum(reason is not None for reason in expected)


def test_questions_that_differ_in_a_number_are_two():
    """Prevents the questions of a series from being taken for one."""
    series = [f"Who won the football World Cup of {year} in the final?" for year in (1990, 1994, 1998)]
    assert gram_cosine(*(grams(text.lower()) for text in series[:2])) > 0.85
    assert reject_reasons(series, [], near_text=0.8) == [None, None, None]
    assert reject_reasons(["Who won the football world cup of 1990 in a final?"], series[:1]) == ["same_text"]


def test_near_vectors_against_a_loop():
    """Prevents paraphrases from staying, and a question that was not kept from making others a repetition."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(15, 4))
    vectors = centres[rng.integers(0, 15, 330)] + rng.normal(0, 0.12, (330, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    held, own = vectors[:10], vectors[10:]
    names = ["".join(rng.choice(list("abcdefghijklmnop"), 8)) + f" {n} is what now?" for n in range(320)]
    names[0] = "too short?"
    kept, expected = list(held), []
    for place, vector in enumerate(own):
        if place == 0:
            expected.append("too_short")
        elif max(float(other @ vector) for other in kept) > 0.95:
            expected.append("near_vector")
        else:
            expected.append(None)
            kept.append(vector)
    found = reject_reasons(names, [f"held {n}?" for n in range(10)], vector_ND=own, existing_MD=held)
    assert found == expected
    assert reject_reasons(names[1:], [], vector_ND=own[1:])[0] is None


def test_the_first_of_equal_questions_is_kept():
    """Prevents both copies from going, and case or punctuation from hiding one."""
    questions = ["What is Dune about, then?", "what is dune about then?", "What is Dune about then"]
    assert reject_reasons(questions, []) == [None, "same_text", "no_question_mark"]
    assert reject_reasons(questions, ["WHAT IS DUNE ABOUT THEN?"]) == ["same_text", "same_text", "no_question_mark"]
    assert reject_reasons([], ["x"]) == []


PASSAGE = "Dune is a 1965 novel by Frank Herbert. It was published by Chilton Books, a printer of repair manuals."


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Frank Herbert", True),
        ("the Frank Herbert.", True),
        ("1965", True),
        ("196", False),
        ("Herbert Frank", True),
        ("Brian Herbert", False),
        ("Frank Books", False),
        ("published by Chilton Books, the printer", True),
        ("Dune repair of manuals", False),
        ("", False),
        ("The.", False),
        ("I do not know", False),
    ],
)
def test_round_trips(answer, found):
    """Prevents parts of words, scattered words and an empty answer from passing for what the passage says."""
    assert is_answered(answer, PASSAGE) == found


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What is the name of the city of Yingkou?", "Yingkou", "gives_answer"),
        ("Which sea does Yingkou lie on?", "Bohai Sea", None),
        ("Is the Bohai Seaside in Yingkou?", "Bohai Sea", None),  # part of a word gives nothing away
        ("Who rules Yingkou?", "a king", "no_round_trip"),
    ],
)
def test_a_question_that_holds_its_answer_teaches_nothing(question, answer, reason):
    """Prevents questions that any passage with the same name would answer (a small LLM asks them)."""
    assert answer_reason(question, answer, "Yingkou is a city on the Bohai Sea.") == reason


def test_round_trips_against_a_brute_force_search():
    """Prevents windows that miss the beginning or end of a passage."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        passage = rng.choice(list("bcdefg"), rng.integers(0, 9)).tolist()
        answer = rng.choice(list("bcdefg"), rng.integers(1, 6)).tolist()
        best = 0
        for begin in range(len(passage)):
            for end in range(begin, min(len(passage), begin + 2 * len(answer)) + 1):
                left, shared = Counter(passage[begin:end]), 0
                for word in answer:
                    shared += left[word] > 0
                    left[word] -= 1
                best = max(best, shared)
        assert is_answered(" ".join(answer), " ".join(passage)) == (best >= 0.8 * len(answer))
