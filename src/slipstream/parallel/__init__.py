"""Several ranks that share one model: who has which part, how parts come together, how ranks are started. No torch here."""
