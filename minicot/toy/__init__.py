"""The built-in world: grade-school problems whose truth is known all the way down, a noisy teacher, and base
weights.

Read problems.py first (scenes, questions, solutions, the step oracle), then teacher.py.
"""
