"""Let people rank answers: tasks, who gets which, their moves, and the rankings that come out."""
