"""What is in a data set, before anything is encoded: per recording and per action column; needs no torch."""
