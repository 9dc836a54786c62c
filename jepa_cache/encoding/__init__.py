"""Stage one: from recordings to the feature cache, each recording through the frozen encoder once."""
