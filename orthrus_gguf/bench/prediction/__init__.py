"""Times of passes on cards that are not at hand, by arithmetic. Nothing here is measured."""
