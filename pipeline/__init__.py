"""The machine: contract, plan, store, workers, measurement, verdict, manifest, report, cli."""
