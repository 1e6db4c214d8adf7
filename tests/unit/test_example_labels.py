"""Labels of in-context examples: what is a classification, and which examples have a question's own label."""

import pyarrow as pa

from llmr_ray.data.example_labels import classifications, has_other_label, is_own_example


def test_classifications_have_the_same_options_everywhere():
    """Prevents questions with options of their own from being taken for labels."""
    queries = pa.table(
        {
            "dataset": ["a", "a", "b", "b", "c", "d", "d"],
            "options": [["No", "Yes"], ["No", "Yes"], ["x", "y"], ["y", "z"], None, ["p", "q"], None],
        }
    )
    assert classifications(queries) == {"a"}


def test_an_example_s_label_is_its_last_line():
    """Prevents a label word within the text from counting, and white space from making two labels of one."""
    query = {"options": ["No", "Yes "], "gold_option": 1}
    assert not has_other_label({"text": "Is it?\nYes"}, query)
    assert not has_other_label({"text": "No\n Yes"}, query)
    assert has_other_label({"text": "Is it?\nNo"}, query)
    assert has_other_label({"text": "Yes\nNo"}, query)
    assert not has_other_label({"text": "Is it?\nNo"}, {"options": ["No", "Yes"], "gold_option": None})


def test_examples_of_a_test_s_training_set_are_its_own():
    """Prevents the tests of MNLI, which are data sets of their own, from taking its examples for another task's."""

    def is_own(dataset, meta):
        return is_own_example({"meta": meta}, {"dataset": dataset})

    assert is_own("rte", '{"dataset": "rte"}')
    assert not is_own("rte", '{"dataset": "snli"}')
    assert not is_own("rte", None)
    assert is_own("mnli_m", '{"dataset": "mnli"}')
    assert not is_own("mnli_m", '{"dataset": "mnli_m"}')
