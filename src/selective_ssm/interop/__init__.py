"""Other libraries' models, adapters and files: what needs packages of theirs, imported when it is used."""
