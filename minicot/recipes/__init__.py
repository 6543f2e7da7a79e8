"""One runnable file a paper. A recipe runs train.py, sample.py and align.py as commands and defines no
loss or loop."""
