"""How anything is kept on disk: whole or not at all, found again after a kill, without secrets."""
