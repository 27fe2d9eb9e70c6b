"""The book's own package: explorers, figures, the chapters and the site; notebooks import it."""
