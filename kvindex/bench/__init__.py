"""`kvindex bench`: what this machine can do, row by row, beside the project's goals.

Each measurement is a generator that gives the figures of one round at a time; `run` chooses, times and prints them.
"""
