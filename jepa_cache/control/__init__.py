"""Planning over a trained world model: what may move, where actions lead, and the search for those that reach a goal."""
