"""Networks and relation encoders as files for other runtimes, and as packages, each with the proof that it is the same."""
