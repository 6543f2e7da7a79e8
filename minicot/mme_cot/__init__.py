"""MME-CoT (arXiv 2502.09621): what judges say of a model's chains, and the official numbers of it.

questions.py   the official rows, and a model's predictions
judge.py       what a judge is asked, and a cache of what judges reply
repair.py      the list in a reply, mended where it is no JSON
scoring.py     the numbers of a cache, equal to the official scripts'
__main__.py    the commands `judge` and `score`
"""
