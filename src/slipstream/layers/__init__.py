"""Parts of a model: they hold parameters and call ops."""
