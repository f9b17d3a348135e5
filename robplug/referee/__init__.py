"""The referee; read in this order.

What is asked for: plan, cells, load, jobs, outlook. Running it: run, guard, verify, heartbeat, store, records.
What came out, from the files alone: rundir, entries, wilson, worst, summary, results, table, report.
"""
