"""The referee; read in this order: plan, run, guard, verify, store, summary, report."""
