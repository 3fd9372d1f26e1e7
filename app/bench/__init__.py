"""`lodger bench`: the same work through the engine, the HTTP server and PEFT; one table, JSON and a plot."""
