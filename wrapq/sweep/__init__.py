"""Many runs from one command: which jobs there are, what runs them, and the record of all of them together."""
