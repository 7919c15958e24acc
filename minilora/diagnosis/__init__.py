"""What people ask of a model that was trained or merged, each answered by a call.

gradients.py    does it train? what is wrong with the gradients, and why
rounding.py     what did merging cost? how much of each update rounding takes
"""
