"""Model cards that let a stranger judge a compressed model in a minute and reproduce it with one command."""
