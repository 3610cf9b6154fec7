"""What ``trimtab explore`` shows: the planner's formulas for every choice, and the page computing them."""
