"""Where artifacts run. One file per target with `probe()` and `recipes()`; runtimes/ opens each kind."""
