"""PEFT, the reference: everything that its format can say."""

from loratool.profiles.limits import Limits

LIMITS = Limits()
