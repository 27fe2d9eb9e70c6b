"""How the embedded benchmark is made: fetched, drawn and packed, and its bases pretrained."""
