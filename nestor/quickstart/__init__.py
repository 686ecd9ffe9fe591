"""The quickstart: train two small models on one text, measure what each remembers, and write one report.

recipe     which two runs, from which models they start, and how many steps fit into the time
display    the one live display
training   both runs, one after the other
measuring  bits per byte by position, recall by distance, and both beyond the attention's reach
memory     a page is read, its State saved, and questions about it answered by a new process
samples    text that the models write
verdict    what the figures say, in sentences that depend on them
tables     the summary, for the screen and for the report
report     report.html
picture    the two main plots side by side, for a README
"""
