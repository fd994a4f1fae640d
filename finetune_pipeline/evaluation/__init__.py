"""Evaluation: benchmark two models, compare them, and decide whether the challenger is promoted.

benchmark.py     questions and expected answers, fixed by a hash
run.py           answers of a GGUF to the benchmark, and its speed
scoring.py       scores of one answer
comparison.py    two models on the same questions, with significance.py and constant_baseline.py
confidence.py    how well confidence separates correct from incorrect answers
gate.py          the rule of promotion
metric_table.py  the table of metrics
report.py        report.html and report.json, with plots.py
"""
