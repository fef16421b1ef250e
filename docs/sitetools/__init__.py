"""How the site is built: equations, executed blocks, executed notebooks, generated pages."""
