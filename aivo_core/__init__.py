"""The numbers of AIVO Federation: NumPy only, no Django, no TensorFlow.

Everything here also runs on a learner's device.
"""

__version__ = "0.1.0"
