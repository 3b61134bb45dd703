"""A sampling rate as it is typed."""

from __future__ import annotations

from argparse import ArgumentTypeError
from fractions import Fraction

from django.utils.translation import gettext as _


def fraction(text: str) -> Fraction:
    """``1/10``, ``0.1`` or ``1`` as an exact fraction in (0, 1].

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ArgumentTypeError(_("must be a fraction such as 1/10, not %s") % ascii(text)[:40]) from error
    if not 0 < found <= 1:
        raise ArgumentTypeError(_("must be above 0 and at most 1, not %s") % ascii(text)[:40])
    return found
