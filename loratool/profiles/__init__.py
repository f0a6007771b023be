"""One consumer of adapters per file: what it accepts."""

from loratool.profiles.profile import (
    PROFILES,
    Fitted,
    Profile,
    allowed_rank,
    check_kinds,
    find_profile,
    fit,
)

__all__ = ["PROFILES", "Fitted", "Profile", "allowed_rank", "check_kinds", "find_profile", "fit"]
