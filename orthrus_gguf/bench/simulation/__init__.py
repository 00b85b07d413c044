"""Strategies compared on hardware that is not at hand: recorded drafts, real decode loop, a clock
that costs drive. Nothing here is measured."""
