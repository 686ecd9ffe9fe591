"""Class-incremental learning: new classes arrive in sessions, and all that came so far are asked for.

A text is followed by its class in words, `text -> label` and a line end. A text is assigned the label of the
greatest probability after `text ->`, the line end included, among the labels of all sessions so far. Arms
differ in what they do with a session's examples (`arms.py`). Answers come from the text alone: nothing that
was read is in the context, but for the arm that is about that.

The experiment is that of arXiv 2512.24695, figure 6, which gives neither class order, nor increments, nor
seeds; these are settings here, and a result says what they were.
"""
