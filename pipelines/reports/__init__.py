"""What people read of a run: pages, tables, plots.

svg.py         lines, dots and text as SVG
thumbnails.py  small pictures for reports
sweep_plot.py  direction against similarity
train.py       the curves of a run
summarize.py   report of a summarize run
evaluate.py    tables, intervals and pictures of an evaluation
compare.py     tables and plot of a comparison
"""
