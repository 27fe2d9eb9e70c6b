# Explorers are saved as stills, and found again while their kernel lives.
from lab import keeping

c.ServerApp.contents_manager_class = keeping.contents_manager()  # noqa: F821
